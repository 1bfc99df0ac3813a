# SPDX-License-Identifier: Apache-2.0
"""Runs `serve run` as a child in its own session, reads its log, and ends it with everything that it started.

`serve run` leaves helpers of Ray's dashboard behind for seconds after it returns, and leaves all of Ray behind when it
is killed. Whoever stops it through here gets a machine without any of its processes.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from disagg.cli import processes
from disagg.errors import ConfigError
from pools.process.shared_files import mapped_by

_NO_TELEMETRY = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ORIGIN = re.compile(r"^\([^)]* pid=\d+[^)]*\) ?")
_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception)(?:\([\w.]+\))?: \S.*")
_FATAL = ("Failed to update the deployments", "Deploying app '")
_PR_SET_PDEATHSIG = 1
_SAMPLE_S = 30.0


class ServeRun:
    """One `serve run`, from start to the last of its processes. Not thread-safe."""

    def __init__(self, config: Path, log: Path, *, drain_s: float) -> None:
        """`drain_s`: seconds that running requests get when it ends."""
        self.log = log
        self._drain_s = drain_s
        self._config = config
        self._shared_before = processes.shared_files()
        self._shared_used: frozenset[Path] = frozenset()
        self._sampled = time.monotonic()
        self._child: subprocess.Popen[bytes] | None = None
        self._offset = 0

    @property
    def pid(self) -> int:
        """Process id of `serve run`, which is its session's too."""
        assert self._child is not None, "start() comes first"
        return self._child.pid

    def start(self) -> None:
        """Start the child, whose output goes to the log.

        The caller must have installed its signal handlers before. Otherwise, in a background job of a shell, the child
        ignores the interrupt that stops it.
        """
        processes.adopt_orphans()
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def end_with_parent() -> None:
            if libc is not None:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)

        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            own_log = self._own_log()
        except OSError as exc:
            raise ConfigError(f"cannot write the log {str(self.log)!r}: {exc.strerror}", path="--log-file") from exc
        with own_log as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "disagg.cli.serve_child", str(self._config), f"{self._drain_s:g}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_env(os.environ.copy()),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def _own_log(self) -> BinaryIO:
        """The log, empty. When another run writes to it, `serve-2.log` beside it and so on, which is `log` from now."""
        asked = self.log
        for number in itertools.count(2):
            output = self.log.open("ab")
            try:
                # The child has the file open until its end, and with it this lock.
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                output.close()
                self.log = asked.with_name(f"{asked.stem}-{number}{asked.suffix}")
            else:
                output.truncate(0)
                return output
        raise AssertionError("unreachable")

    def exit_code(self) -> int | None:
        """Exit code of the child, or None while it runs."""
        return self._child.poll() if self._child else None

    def new_lines(self) -> list[str]:
        """Whole lines that were logged since the last call."""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [_COLOUR.sub("", line) for line in data[:end].decode(errors="replace").splitlines()]

    def sample(self) -> None:
        """Note which shared-memory files the run uses. Cheap to call often: it looks every 30 s."""
        if time.monotonic() - self._sampled >= _SAMPLE_S:
            self._note_shared()

    def stop(self, *, patience_s: float, hurry: Callable[[], bool], say: Callable[[str], None]) -> list[str]:
        """Ends the run: interrupt, then terminate, then kill. Blocks. Returns what is left over, in words.

        Args:
            patience_s: seconds from the interrupt until the child is terminated.
            hurry: asked again and again; True skips the rest of the drain.
            say: shows a line of progress.
        """
        assert self._child is not None, "start() comes first"
        child = self._child
        self._note_shared()
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            if not self._wait_child(patience_s, hurry, say):
                say("ending it without waiting for requests")
                child.terminate()
                self._wait_child(10.0, lambda: False, say)
        left = processes.wait_gone(child.pid, 0.5)
        for number, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
            if left:
                processes.send(left, number)
                left = processes.wait_gone(child.pid, patience_s)
        child.poll()
        processes.collect_ended(child.pid)
        kept = processes.remove_shared(self._shared_before, self._shared_used)
        for file in kept:
            say(f"kept {file}: new and unused, but not seen in use by this run")
        return [f"process {process.pid} ({process.name}) does not end" for process in left]

    def _wait_child(self, timeout_s: float, hurry: Callable[[], bool], say: Callable[[str], None]) -> bool:
        started = shown = time.monotonic()
        while self.exit_code() is None:
            at = time.monotonic()
            if at - started >= timeout_s or hurry():
                return False
            if at - shown >= 5:
                shown = at
                say(f"stopping: {at - started:.0f} s, {len(processes.remaining(self.pid))} processes left")
            time.sleep(0.1)
        return True

    def _note_shared(self) -> None:
        self._sampled = time.monotonic()
        if processes.shared_files() - self._shared_before:
            self._shared_used |= mapped_by(process.pid for process in processes.remaining(self.pid))


def child_env(env: dict[str, str]) -> dict[str, str]:
    """The environment of `serve run`: no telemetry unless asked for, the interpreter's own commands first in PATH."""
    path = os.pathsep.join(part for part in (str(Path(sys.executable).parent), env.get("PATH", "")) if part)
    return {**_NO_TELEMETRY, **env, "PATH": path}


def is_fatal(line: str) -> bool:
    """True for a log line after which Serve does not try to deploy any more."""
    return _FATAL[0] in line or (_FATAL[1] in line and "failed" in line)


def reason(lines: list[str]) -> str | None:
    """The innermost error that a log names last, such as `ValueError: no such file`; None when it names none."""
    for line in reversed(lines):
        text = _ORIGIN.sub("", line).strip()
        if (
            _ERROR.match(text)
            and not text.startswith("ray.exceptions.")
            and not text.endswith("Traceback (most recent call last):")
        ):
            return text
    return None
