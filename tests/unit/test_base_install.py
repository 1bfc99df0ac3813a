# SPDX-License-Identifier: Apache-2.0
"""The wheel with its three dependencies in a fresh environment: the SDK, the client commands and `disagg check`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from disagg.advice.check import check_file
from tests.support.base_install import (
    BASE,
    ROOT,
    BaseInstall,
    base_closure,
    build_wheel,
    copy_base,
    create,
    install_wheel,
)

IMPORT_MS = 150.0
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
POOL = {"name": "decode", "target_num_replicas": 1, "num_routable": 1}
POOLS = {"pools": [{**POOL, "replicas": [{"replica_id": "d-0", "state": "routable"}]}]}
HANDOFFS = {"totals": {"produced": {"count": 0}}, "num_open": 0, "balanced": True}
CHECK_ALL = """
import contextlib, io, json, sys
from disagg.cli.main import main
reports = {}
for file in sys.argv[1:]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["check", file, "--json"])
    reports[file] = json.loads(out.getvalue())
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> BaseInstall:
    """The environment, made once."""
    directory = tmp_path_factory.mktemp("base-install")
    install = create(directory / "env")
    copy_base(install)
    install_wheel(install, build_wheel(directory))
    return install


class _Gateway(BaseHTTPRequestHandler):
    """What a gateway answers to an operator with the key."""

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Bearer secret":
            self._answer(401, {"error": {"message": "no key"}})
        else:
            self._answer(200, HANDOFFS if "handoffs" in self.path else POOLS)

    def do_POST(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(202, {"name": "decode", "target_num_replicas": wanted["num_replicas"]})

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""

    def _answer(self, status: int, body: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Address of a gateway's admin API."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory with the model that the small configs name."""
    model = tmp_path / ".cache" / "tiny-model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"x")
    return tmp_path


def test_nothing_else_is_installed(install: BaseInstall) -> None:
    """The environment holds the wheel, its three dependencies and what these need."""
    assert install.distributions() == {"disagg", *base_closure()}
    assert set(BASE) < base_closure()


def test_help(install: BaseInstall, tmp_path: Path) -> None:
    """`disagg --help` lists every command, and each of them explains itself."""
    said = install.run("disagg", "--help", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    for command in ("serve", "status", "scale", "handoffs", "check", "tiny-model"):
        assert command in said.stdout
        assert install.run("disagg", command, "--help", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("status",), "decode: target 1, routable 1"),
        (("scale", "decode", "1"), "decode: 1 replicas ready"),
        (("scale", "decode", "1", "--no-wait"), "1 replicas asked for"),
        (("handoffs",), "produced 0 = consumed 0"),
    ],
    ids=["status", "scale", "scale --no-wait", "handoffs"],
)
def test_client_commands(install: BaseInstall, url: str, tmp_path: Path, command: tuple[str, ...], words: str) -> None:
    """Each client command asks a gateway over HTTP and prints what it answered."""
    said = install.run("disagg", *command, "--url", url, cwd=tmp_path, DISAGG_API_KEY="secret")
    assert (said.returncode, said.stderr) == (0, "")
    assert words in said.stdout


def test_check_of_every_config(install: BaseInstall, elsewhere: Path) -> None:
    """`disagg check` finds in each shipped config what it finds beside vLLM, and says what it could not look at."""
    said = install.run("python", "-c", CHECK_ALL, *map(str, CONFIGS), cwd=elsewhere)
    assert said.returncode == 0, said.stderr
    reports = json.loads(said.stdout)
    for file in CONFIGS:
        report = reports[str(file)]
        whole = check_file(file, base_dir=elsewhere, installed=lambda module: True, ask=None)
        # Whether the HTTP port is free may change between the two looks.
        expected = [problem.as_dict() for problem in whole.problems if problem.path != "http_options.port"]
        assert [problem for problem in report["problems"] if problem["path"] != "http_options.port"] == expected
        assert report["deployments"] == whole.as_dict()["deployments"]
        assert "vLLM is not installed" in report["not_checked"]
        assert whole.not_checked is None


@pytest.mark.parametrize(
    ("command", "packages"),
    [(("serve", str(CONFIGS[0])), "ray, psutil"), (("tiny-model", "model"), "numpy, tokenizers")],
    ids=["serve", "tiny-model"],
)
def test_commands_that_need_more(install: BaseInstall, tmp_path: Path, command: tuple[str, ...], packages: str) -> None:
    """A command that needs more than the base install says in one line what, and which extra brings it."""
    said = install.run("disagg", *command, cwd=tmp_path)
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr == (
        f"disagg: {command[0]} needs {packages}, which the base install leaves out; "
        "install disagg[cpu] or disagg[gpu]\n"
    )


def test_sdk_import_is_cheap(install: BaseInstall) -> None:
    """Importing both clients takes less than 150 ms of CPU time."""
    assert min(install.import_ms(clock="process_time", num_runs=5)) < IMPORT_MS
