# SPDX-License-Identifier: Apache-2.0
"""Line 6: a newcomer's first day on a fresh clone: the commands and steps of the documents, their output kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import yaml

from disagg.cli.processes import shared_files
from tests.prove.report import ROOT, Row
from tests.prove.serve_clone import clean_env, clone
from tests.support.certificates import self_signed
from tests.support.stack import free_port, wait_until

LINE = 6
KEPT = ROOT / "build" / "first-day"
START_S = 300.0
STOP_S = 60.0
HUB_S = 10.0


def first_day() -> list[Row]:
    KEPT.mkdir(parents=True, exist_ok=True)
    with clone() as where:
        set_up = _run(where, "make", "setup", name="setup", timeout_s=900)
        day = Day(where)
        rows = [day.row("make setup", f"exit {set_up.code}", "exit 0", set_up.code == 0)]
        rows += day.checks()
        rows += day.hub()
        rows += day.serving()
        rows += day.behind_tls()
    return rows


class Output:
    """What one command printed, and how it ended."""

    def __init__(self, code: int, text: str, took_s: float) -> None:
        self.code, self.text, self.took_s = code, text, took_s

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]


def _run(where: Path, *command: str, name: str, timeout_s: float = 120, **env: str) -> Output:
    """Run a command in the clone as a newcomer would; keep its output."""
    started = time.monotonic()
    environment = {**clean_env(), "PATH": f"{where / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}", **env}
    done = subprocess.run(
        command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s
    )
    output = Output(done.returncode, done.stdout.decode(errors="replace"), time.monotonic() - started)
    (KEPT / f"{name}.txt").write_text(f"$ {' '.join(command)}\n{output.text}\nexit {output.code}\n")
    return output


class Day:
    """The steps, in the order in which a newcomer takes them."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def row(self, what: str, figure: str, bound: str, holds: bool) -> Row:
        return Row(LINE, what, figure[:100], bound, holds)

    def config(self, name: str, change: Callable[[dict[str, Any]], None] = lambda _: None) -> tuple[str, int]:
        """A copy of the quickstart with a free port and a change, and the port."""
        data = yaml.safe_load((self.where / "configs" / "quickstart.yaml").read_text())
        port = free_port()
        data["http_options"]["port"] = port
        change(data)
        (self.where / f"{name}.yaml").write_text(yaml.safe_dump(data))
        return f"{name}.yaml", port

    def checks(self) -> list[Row]:
        """A config with errors: they come last, once each, with no plan over them; nothing that does nothing passes."""

        def wrong(data: dict[str, Any]) -> None:
            data["applications"][0]["args"]["model"]["engine_kwargs"]["tensor_parallel_size"] = 3
            data["applications"][0]["deployments"][1].update(num_replicas=None, autoscaling_config={"min_replicas": 1})

        file, _ = self.config("wrong", wrong)
        found = _run(self.where, "disagg", "check", file, name="check-wrong")
        errors = [line for line in found.lines if line.startswith("error:")]
        first = next((i for i, line in enumerate(found.lines) if line.startswith("error:")), 0)
        later = [line for line in found.lines[first:] if line.startswith("warning:")]
        scaling = any("autoscaling_config" in line and "nothing would act on it" in line for line in errors)
        planned = any(line.startswith(("prefill:", "decode:", "gateway:")) for line in found.lines)
        extra = (self.where / "pyproject.toml").read_text()
        return [
            self.row(
                "errors of a check come last", f"{len(later)} warnings after them", "0", bool(errors) and not later
            ),
            self.row(
                "each error once",
                f"{len(errors)}, {len(set(errors))} different",
                "alike",
                len(set(errors)) == len(errors),
            ),
            self.row("no plan over errors", "plan" if planned else "none", "none", not planned),
            self.row("autoscaling_config of a pool", "refused" if scaling else "passes", "refused", scaling),
            self.row("the S3 tier's package is in the GPU extra", str("boto3" in extra), "True", "boto3" in extra),
        ]

    def hub(self) -> list[Row]:
        """A model of a hub that does not answer."""
        file, _ = self.config("hub")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            found = _run(
                self.where, "disagg", "serve", file, "--model", "a/model-that-is-not-here", name="hub", HF_ENDPOINT=url
            )
        told = next((line for line in found.lines if "the hub" in line), "not told")
        holds = found.code != 0 and found.took_s <= HUB_S and "did not answer" in told
        return [self.row("a hub that cannot be reached", f"{found.took_s:.1f} s: {told}", f"{HUB_S:g} s", holds)]

    def serving(self) -> list[Row]:
        """The whole tour over one running application, of a model of one's own."""
        own = self.where / "my-model"
        subprocess.run(["cp", "-r", str(self.where / ".cache" / "tiny-model"), str(own)], check=True)
        file, port = self.config("mine")
        url = f"http://127.0.0.1:{port}"
        before = shared_files()
        command = ["disagg", "serve", file, "--model", str(own)]
        with self._served(command, "serve", url, said="ready after") as lines:
            rows = self._start_rows(lines)
            models = [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=30).json()["data"]]
            rows.append(self.row("a model in one step", str(models), "['my-model']", models == ["my-model"]))
            rows += self._ray_commands(lines)
            rows += self._beside(file)
            rows += self._requests(url)
            rows += self._scaling(url)
            stopped = self._stop(lines, signal.SIGINT)
        rows.append(self.row("Ctrl-C after a scale to 500", f"{stopped:.0f} s", f"{STOP_S:g} s", stopped <= STOP_S))
        left = shared_files() - before
        rows.append(self.row("files left in /dev/shm", str(len(left)), "0", not left))
        return rows

    def _start_rows(self, lines: list[str]) -> list[Row]:
        text = "\n".join(lines)
        counts = [
            tuple(map(int, re.findall(r"(\d+)/\d+ ready", line))) for line in lines if line.startswith("starting:")
        ]
        flaps = sum(any(b < a for a, b in zip(one, two, strict=False)) for one, two in pairwise(counts))
        key = "answered 403" not in text and "wrote an admin key" in text
        log = (self.where / "build" / "serve.log").read_text(errors="replace")
        roots = len(re.findall(r"GET / 503", log))
        return [
            self.row("the missing admin key of a first start", "made, no warning" if key else "warned", "made", key),
            self.row("progress that goes back while it starts", str(flaps), "0", flaps == 0),
            self.row("503s of a start in the log as `GET /`", str(roots), "0", roots == 0),
        ]

    def _ray_commands(self, lines: list[str]) -> list[Row]:
        """Serve's own command line beside a running application, as `disagg serve` has printed it."""
        said = any("RAY_AUTH_MODE=token serve status" in line for line in lines)
        found = _run(self.where, "serve", "status", name="serve-status", RAY_AUTH_MODE="token")
        traceback = "Traceback" in found.text
        holds = found.code == 0 and not traceback and "disagg" in found.text
        return [
            self.row("how Serve's commands are called", "said" if said else "not said", "said", said),
            self.row("serve status", f"exit {found.code}, {len(found.lines)} lines", "no traceback", holds),
        ]

    def _beside(self, file: str) -> list[Row]:
        refused = _run(self.where, "disagg", "check", file, name="check-beside")
        update = _run(self.where, "disagg", "check", "--update", file, name="check-update")
        hint = "--update" in refused.text
        return [
            self.row(
                "a check beside the running application",
                "says --update" if hint else "does not say how",
                "--update",
                hint,
            ),
            self.row("disagg check --update", f"exit {update.code}", "exit 0", update.code == 0),
        ]

    def _requests(self, url: str) -> list[Row]:
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
        chat = {"model": "my-model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
        answer = httpx.post(
            f"{url}/v1/chat/completions", json={**chat, "tools": tools, "tool_choice": "auto"}, timeout=60
        )
        message = answer.json().get("error", {}).get("message", "")
        ours = "enable_auto_tool_choice" in message.replace("--", "")
        before = _metric(url, "disagg_local_prefills_total")
        for _ in range(61):
            httpx.post(f"{url}/v1/completions", json={"model": "my-model", "prompt": "x", "max_tokens": -1}, timeout=60)
        counted = _metric(url, "disagg_local_prefills_total") - before
        return [
            self.row("tools without a parser", f"{answer.status_code}: {message}", "names our setting", ours),
            self.row("61 refused requests, as local prefills", f"{counted:g}", "0", counted == 0),
        ]

    def _scaling(self, url: str) -> list[Row]:
        key = ["--url", url, "--api-key-file", ".cache/admin-key"]
        more = _run(self.where, "disagg", "scale", "decode", "500", "--wait-s", "8", *key, name="scale-500")
        status = _run(self.where, "disagg", "status", *key, name="status-500")
        waiting = "without a place" in status.text and "each needs" in status.text
        started = time.monotonic()
        less = _run(
            self.where, "disagg", "scale", "decode", "1", "--wait-s", "240", *key, name="scale-1", timeout_s=300
        )
        took = time.monotonic() - started
        after = json.loads(_run(self.where, "disagg", "status", "--json", *key, name="status-1").text)
        pool = next(pool for pool in after["pools"] if pool["name"] == "decode")
        changing = sum(pool[name] or 0 for name in ("num_starting", "num_unplaced", "num_stopping"))
        return [
            self.row(
                "scale decode 500",
                f"exit {more.code}: {more.lines[-1] if more.lines else ''}",
                "says what is missing",
                more.code != 0 and "without a place" in more.text,
            ),
            self.row(
                "status of it",
                "tells the bundle that has no place" if waiting else "silent",
                "bundle and reason",
                waiting,
            ),
            self.row(
                "back to 1 is done when it is",
                f"{took:.1f} s, then {changing} come or go",
                "0",
                less.code == 0 and changing == 0,
            ),
        ]

    def behind_tls(self) -> list[Row]:
        """A self-signed certificate, `serve run` in place of ours, and its end by SIGTERM."""
        certificate = self_signed(self.where)

        def tls(data: dict[str, Any]) -> None:
            data["http_options"].update(ssl_certfile=str(certificate.cert), ssl_keyfile=str(certificate.key))

        file, port = self.config("tls", tls)
        url = f"https://127.0.0.1:{port}"
        before = shared_files()
        with self._served(["serve", "run", file], "serve-run-tls", url) as lines:
            key = ["--url", url, "--api-key-file", ".cache/admin-key"]
            bare = _run(self.where, "disagg", "status", *key, name="status-tls")
            trusting = _run(
                self.where, "disagg", "status", "--ca-file", str(certificate.cert), *key, name="status-ca-file"
            )
            proxied = _run(
                self.where,
                *("disagg", "status", "--ca-file", str(certificate.cert), *key),
                name="status-proxy",
                HTTPS_PROXY="http://127.0.0.1:9",
            )
            self._stop(lines, signal.SIGTERM)
        time.sleep(3)
        left = shared_files() - before
        return [
            self.row(
                "a self-signed certificate", bare.lines[-1] if bare.lines else "", "--ca-file", "--ca-file" in bare.text
            ),
            self.row("disagg status --ca-file", f"exit {trusting.code}", "exit 0", trusting.code == 0),
            self.row("the same with HTTPS_PROXY set", f"exit {proxied.code}", "exit 0", proxied.code == 0),
            self.row("SIGTERM of `serve run`: files left in /dev/shm", str(len(left)), "0", not left),
        ]

    @contextlib.contextmanager
    def _served(self, command: list[str], name: str, url: str, said: str | None = None) -> Iterator[list[str]]:
        """Lines that the command prints, once requests are answered, or once it has `said` so."""
        environment = {**clean_env(), "PATH": f"{self.where / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        process = subprocess.Popen(
            command,
            cwd=self.where,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._process = process
        lines: list[str] = []

        def collect() -> None:
            assert process.stdout is not None
            for raw in process.stdout:
                lines.append(raw.decode(errors="replace").rstrip("\n"))

        threading.Thread(target=collect, daemon=True).start()

        def ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended:\n" + "\n".join(lines[-20:]))
            if said is not None:
                return any(line.startswith(said) for line in lines)
            with contextlib.suppress(httpx.HTTPError, ValueError):
                return bool(httpx.get(f"{url}/health", verify=False, timeout=5).json().get("status") == "ok")
            return False

        try:
            wait_until(ready, START_S, f"{url} answers", 1.0)
            yield lines
        finally:
            if process.poll() is None:
                self._stop(lines, signal.SIGINT)
            (KEPT / f"{name}.txt").write_text(f"$ {' '.join(command)}\n" + "\n".join(lines) + "\n")

    def _stop(self, lines: list[str], number: int) -> float:
        started = time.monotonic()
        self._process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(150)
        if self._process.poll() is None:
            self._process.kill()
        return time.monotonic() - started


def _metric(url: str, name: str) -> float:
    lines = [line for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
