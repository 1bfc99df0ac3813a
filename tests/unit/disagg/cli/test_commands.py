# SPDX-License-Identifier: Apache-2.0
"""The thin commands: what they print, where, and their exit codes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from disagg.cli import connection
from disagg.cli.main import build_parser, main
from disagg.cli.status import duration
from disagg.errors import ConfigError
from disagg.sdk.client import Client

POOLS = {
    "pools": [
        {
            "name": "prefill",
            "target_num_replicas": 1,
            "num_routable": 1,
            "replicas": [
                {
                    "replica_id": "abc",
                    "state": "routable",
                    "num_requests_running": 2,
                    "num_requests_waiting": 0,
                    "num_requests_in_flight": 3,
                    "kv_cache_usage": 0.126,
                    "uptime_s": 3725,
                }
            ],
        },
        {
            "name": "decode",
            "target_num_replicas": None,
            "num_routable": 0,
            "replicas": [{"replica_id": "longer-id", "state": "warming"}],
        },
    ]
}


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stub server: set `status` and `json`; `seen` holds the last request."""
    state: dict[str, Any] = {"status": 200, "json": POOLS}

    def handle(request: httpx.Request) -> httpx.Response:
        state["seen"] = request
        if request.method == "POST" and state["status"] == 200:
            name = request.url.path.split("/")[4]
            return httpx.Response(202, json={"name": name, "target_num_replicas": 1})
        return httpx.Response(state["status"], json=state["json"])

    def client(args: Any) -> Client:
        return Client(args.url, "secret", transport=httpx.MockTransport(handle))

    monkeypatch.setattr(connection, "client", client)
    return state


def test_status_table(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Pools, then a row a replica; what is unknown is a dash."""
    assert main(["status"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "prefill: target 1, routable 1",
        "  REPLICA    STATE     RUNNING  WAITING  IN FLIGHT   KV  UPTIME",
        "  abc        routable        2        0          3  13%   1h02m",
        "decode: target ?, routable 0",
        "  REPLICA    STATE     RUNNING  WAITING  IN FLIGHT   KV  UPTIME",
        "  longer-id  warming         -        -          -    -       -",
    ]


def test_status_json(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON has the form of the admin API."""
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pools"][0]["replicas"][0]["replica_id"] == "abc"


def test_scale_waits(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The outcome says how many replicas and how long."""
    assert main(["scale", "prefill", "1"]) == 0
    assert capsys.readouterr().out.startswith("prefill: 1 replicas ready after 0.")
    assert main(["scale", "prefill", "1", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["target_num_replicas"], outcome["pool"]["num_routable"]) == (1, 1)


def test_scale_without_waiting(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """--no-wait asks and returns."""
    assert main(["scale", "decode", "2", "--no-wait"]) == 0
    assert answer["seen"].method == "POST"
    assert "asked for" in capsys.readouterr().out


def test_scale_timeout(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A wait that runs out is exit code 1 with one line that says what is missing."""
    assert main(["scale", "decode", "1", "--wait-s", "0", "--json"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "0 of 1 are routable, 1 warming" in error


HANDOFFS: dict[str, Any] = {
    "totals": {
        "produced": {"count": 3, "tokens": 300, "bytes": 3 * 2**20},
        "consumed": {"count": 1, "tokens": 100, "bytes": 2**20},
        "rescued": {"count": 1, "tokens": 100, "bytes": 2**20},
        "stored": {"count": 1, "tokens": 96, "bytes": 2**19},
        "reused": {"count": 0, "tokens": 0, "bytes": 0},
    },
    "num_open": 1,
    "balanced": True,
    "records": [
        {
            "handoff_id": "gw-2",
            "request_id": "request-2",
            "prefill": {"replica_id": "p0"},
            "decode": {"replica_id": "d0"},
            "outcome": "rescued",
            "reason": "client_left",
            "tokens": 100,
            "bytes": 2**20,
            "lease_left_s": 12.34,
            "reused_at": 5.0,
            "reused_tokens": 96,
        },
        {"handoff_id": "gw-1", "outcome": "open"},
    ],
}


def test_handoffs_table(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A row a record, then the balance; what is unknown is a dash. Filters reach the server."""
    answer["json"] = HANDOFFS
    assert main(["handoffs", "--outcome", "rescued", "--replica", "p0", "--request-id", "r", "--since-s", "60"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "PRODUCED  HANDOFF  REQUEST    PREFILL  DECODE  OUTCOME  TOKENS  MIB  LEASE  REUSED  REASON",
        "-         gw-2     request-2  p0       d0      rescued     100  1.0  12.3s      96  client_left",
        "-         gw-1     -          -        -       open          0  0.0      -       -  -",
        "produced 3 = consumed 1 + released 0 + rescued 1 + expired 0 + failed 0 + open 1",
        "produced: 3 hand-offs, 300 tokens, 3.0 MiB",
        "stored: 1 hand-offs, 96 tokens, 0.5 MiB",
        "reused: 0 hand-offs, 0 tokens, 0.0 MiB",
    ]
    params = dict(answer["seen"].url.params)
    assert time.time() - float(params.pop("since")) == pytest.approx(60, abs=10)
    assert params == {"outcome": "rescued", "replica": "p0", "request_id": "r", "limit": "20"}


def test_handoffs_json(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON has the form of the admin API; books that do not balance are exit code 1."""
    answer["json"] = HANDOFFS
    assert main(["handoffs", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["records"][0]["request_id"] == "request-2" and printed["totals"]["stored"]["tokens"] == 96
    answer["json"] = HANDOFFS | {"balanced": False, "records": []}
    assert main(["handoffs"]) == 1
    assert capsys.readouterr().out.startswith("produced 3 != consumed 1 + ")


def test_refusal_is_one_line(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Errors go to stderr, without traceback."""
    answer |= {"status": 409, "json": {"error": {"message": "cannot scale"}}}
    assert main(["scale", "decode", "2"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("disagg: POST http://127.0.0.1:8000/admin/v1/pools/decode/scale answered 409")
    assert "external_scaler_enabled: true" in captured.err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["scale", "decode", "0"],
        ["scale", "decode", "x"],
        ["check"],
        *(["status", "--timeout-s", text] for text in ("-1", "0", "nan", "1e12", "soon")),
        ["serve", "x.yaml", "--drain-s", "-1"],
        ["serve", "x.yaml", "--max-start-failures", "0"],
    ],
)
def test_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage is exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: disagg" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "status", "scale", "handoffs", "check", "tiny-model"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself."""
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: disagg {command}" in capsys.readouterr().out


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that cannot be served is exit code 1, as text and as JSON."""
    missing = str(tmp_path / "none.yaml")
    assert main(["check", missing]) == 1
    assert "cannot read" in capsys.readouterr().out
    assert main(["check", missing, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_key_order(tmp_path: Path) -> None:
    """The key comes from the file named, else the environment, else the default file, else there is none."""
    named, default = tmp_path / "named", tmp_path / "default"
    named.write_text("from-file\n")
    environ = {"DISAGG_API_KEY": "from-env"}
    assert connection.find_key(named, environ, default=default) == "from-file"
    assert connection.find_key(None, environ, default=default) == "from-env"
    assert connection.find_key(None, {}, default=default) is None
    default.write_text("from-default")
    assert connection.find_key(None, {"DISAGG_API_KEY": ""}, default=default) == "from-default"


def test_bad_key_files(tmp_path: Path) -> None:
    """A key file that is missing or empty is named."""
    with pytest.raises(ConfigError, match="No such file"):
        connection.find_key(tmp_path / "none", {})
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        connection.find_key(tmp_path / "empty", {})
    for text in ("# of the operator\nsecret\n", "schlüssel"):
        (tmp_path / "odd").write_text(text)
        with pytest.raises(ConfigError, match="more than one line of printable ASCII"):
            connection.find_key(tmp_path / "odd", {})


def test_a_password_in_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, because the key goes in its place; and not repeated."""
    assert main(["status", "--url", "http://operator:secret@127.0.0.1:8000"]) == 1
    told = capsys.readouterr().err
    assert "names a user of 127.0.0.1" in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.9, "9s"), (245, "4m05s"), (12000, "3h20m"), (2 * 86400 + 3 * 3600, "2d03h")]
)
def test_duration(seconds: float, text: str) -> None:
    """Two units at most."""
    assert duration(seconds) == text
