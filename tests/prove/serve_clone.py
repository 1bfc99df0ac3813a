# SPDX-License-Identifier: Apache-2.0
"""Lines 1 and 2: a clean clone with no environment serves, stops without a trace, and passes its tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.prove.report import ROOT, Row

FIRST_S = 8 * 60
SECOND_S = 90
TEST_S = 30 * 60
PORT = 8000


@contextmanager
def clone() -> Iterator[Path]:
    """A fresh clone of what is committed, beside nothing of this checkout's environment."""
    parent = Path(tempfile.mkdtemp(prefix="disagg-clone-"))
    try:
        subprocess.run(["git", "clone", "-q", str(ROOT), str(parent / "disagg")], check=True)
        yield parent / "disagg"
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def clean_env() -> dict[str, str]:
    """This environment without what names an environment of Python or a run of make."""
    return {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MAKEFLAGS")}


def _processes(where: Path) -> set[tuple[int, str]]:
    """Process ids and names of what runs in the clone or was started from it; others on the machine come and go."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                environment = (entry / "environ").read_bytes().decode(errors="replace")
                directory = str((entry / "cwd").resolve())
            except OSError:
                continue
            if any(str(where) in text for text in (command, environment, directory)):
                found.add((int(entry.name), command[:120]))
    return found


def _serve_once(where: Path, bound_s: float, what: str) -> list[Row]:
    """`make serve`, the curl it prints, Ctrl-C, and what is left."""
    processes, shared = _processes(where), set(os.listdir("/dev/shm"))
    started = time.monotonic()
    serving = subprocess.Popen(
        ["make", "serve"],
        cwd=where,
        env=clean_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    lines: list[str] = []

    def collect() -> None:
        assert serving.stdout is not None
        for line in serving.stdout:
            lines.append(line.decode(errors="replace").rstrip("\n"))
            print(f"    | {lines[-1]}", flush=True)

    threading.Thread(target=collect, daemon=True).start()
    while not any(line.startswith("curl ") for line in lines):
        if serving.poll() is not None or time.monotonic() - started > 2 * bound_s:
            break
        time.sleep(0.1)
    took = time.monotonic() - started
    command = next((line for line in lines if line.startswith("curl ")), "false")
    pasted = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    answered = pasted.returncode == 0 and '"choices"' in pasted.stdout
    last_two = [line for line in lines if line.strip()][-2:]
    # A terminal's Ctrl-C reaches the whole foreground group.
    os.killpg(serving.pid, signal.SIGINT)
    stopped = time.monotonic()
    code = serving.wait(180)
    stop_s = time.monotonic() - stopped
    deadline = time.monotonic() + 5
    while (
        left := {p for p in _processes(where) - processes if Path(f"/proc/{p[0]}").exists()}
    ) and time.monotonic() < deadline:
        time.sleep(0.2)
    files = set(os.listdir("/dev/shm")) - shared
    for process in left:
        print(f"    left: {process}")
    return [
        Row(1, f"{what}: answering after", f"{took:.0f} s", f"{bound_s:g} s", answered and took <= bound_s),
        Row(
            1, f"{what}: the printed curl, pasted", "answers" if answered else pasted.stderr[-80:], "answers", answered
        ),
        Row(
            1,
            f"{what}: the last lines are URL and curl",
            "yes"
            if len(last_two) == 2 and last_two[0].startswith("http://") and last_two[1] == command
            else str(last_two)[:60],
            "yes",
            len(last_two) == 2 and last_two[0].startswith("http://") and last_two[1] == command,
        ),
        Row(1, f"{what}: Ctrl-C, exit code {code} after {stop_s:.0f} s; processes left", str(len(left)), "0", not left),
        Row(1, f"{what}: files left in /dev/shm", str(len(files)), "0", not files),
    ]


def clean_clone() -> list[Row]:
    with clone() as where:
        return [*_serve_once(where, FIRST_S, "first make serve"), *_serve_once(where, SECOND_S, "second make serve")]


def clean_clone_test() -> list[Row]:
    with clone() as where:
        started = time.monotonic()
        tests = subprocess.run(["make", "test"], cwd=where, env=clean_env(), check=False)
        took = time.monotonic() - started
    return [
        Row(
            2,
            "make test in a clean clone",
            f"exit {tests.returncode} after {took / 60:.1f} min",
            "exit 0 within 30 min",
            tests.returncode == 0 and took <= TEST_S,
        )
    ]
