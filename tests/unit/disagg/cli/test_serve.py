# SPDX-License-Identifier: Apache-2.0
"""`disagg serve` without Ray: refusing, the key file, reading logs, finding processes and shared memory."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from disagg.cli import serving
from disagg.cli.main import main
from disagg.cli.processes import Process, belonging_to, process_table, remove_shared
from disagg.cli.starting import Starting
from disagg.cli.supervise import ServeRun, child_env, is_fatal, reason
from disagg.errors import ConfigError
from disagg.key_lines import parse
from pools.process.shared_files import mapped_by
from pools.replica.start_failure import StartFailure
from tests.support.stack import wait_until

LOG = """\
(ServeController pid=9) INFO 2026-11-21 22:57:48 controller 9 -- Adding 1 replica to Deployment(name='prefill').
(ServeController pid=9) ray.exceptions.RayTaskError(RuntimeError): ray::ServeReplica:disagg:prefill (pid=5, ip=1)
(ServeController pid=9) RuntimeError: Traceback (most recent call last):
(ServeController pid=9)   File "app.py", line 11, in __init__
(ServeController pid=9)     raise RuntimeError("weights not found")
(ServeController pid=9) RuntimeError: weights not found
(ServeController pid=9) ERROR 2026-11-21 22:57:51 controller 9 -- Failed to update the deployments ['prefill'].
""".splitlines()


def test_refuses_before_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with problems starts nothing and leaves no log."""
    log = tmp_path / "serve.log"
    assert main(["serve", str(tmp_path / "none.yaml"), "--log-file", str(log)]) == 1
    assert "cannot read" in capsys.readouterr().err
    assert not log.exists()


def test_key_file(tmp_path: Path) -> None:
    """A missing key file is made, private and random; an existing one is kept."""
    file = tmp_path / "new" / "key"
    assert serving.ensure_key(file)
    key = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(key.strip()) >= 32
    assert not serving.ensure_key(file)
    assert file.read_text() == key
    assert serving.ensure_key(tmp_path / "keys", name="default")
    [(name, _)] = parse((tmp_path / "keys").read_text())
    assert name == "default"


def test_curl_survives_the_shell() -> None:
    """The command is one argument each, whatever the model is called."""
    words = shlex.split(serving.curl("http://127.0.0.1:8000", "it's $HOME"))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "it's $HOME"
    assert "Authorization: Bearer $API_KEY" in shlex.split(serving.curl("http://h:1", "m", needs_key=True))


def test_progress() -> None:
    """Ready and wanted replicas of both pools."""
    assert serving.progress({"prefill": 1}, {"prefill": 2, "gateway": 1}) == "prefill 1/2 ready, decode 0 ready"


class Gone(io.StringIO):
    """A terminal or a pipe whose other end is closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_nobody_reads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to nobody ends nothing: the run has still to be stopped."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        patch.setattr(sys, "stdout", Gone())
        serving._say("stopping")
        serving._print("http://127.0.0.1:8000")
        serving._say("and so on")
        sys.stderr.close()
        sys.stdout.close()


@pytest.mark.parametrize(("before", "seen"), [(signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])])
def test_the_end_of_a_terminal(before: signal.Handlers, seen: list[int]) -> None:
    """Ends the run, but not one that `nohup` has started."""
    kept = signal.signal(signal.SIGHUP, before)
    try:
        with serving._interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            wait_until(lambda: interrupts == seen, 5, "it is heard")
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    """Told with the option's name; nothing has started."""
    for file in (Path("/dev/null"), Path("/dev/null/x"), tmp_path):
        with pytest.raises(ConfigError, match="cannot write the log"):
            ServeRun(tmp_path / "none.yaml", file, drain_s=1).start()


def test_progress_goes_on() -> None:
    """A replica that is up and too busy for a moment still counts; once one has failed, only what is there does."""
    starting = Starting(max_failures=3)
    before = serving.most_ready({}, {"prefill": 0, "decode": 1}, starting)
    assert serving.most_ready(before, {"prefill": 1, "decode": 0}, starting) == {"prefill": 1, "decode": 1}
    starting.feed(StartFailure("decode", "abc", "it died").line())
    assert serving.most_ready(before, {"prefill": 1, "decode": 0}, starting) == {"prefill": 1, "decode": 0}


def test_reads_the_log() -> None:
    """The line after which Serve gives up, and the innermost error before it."""
    assert [is_fatal(line) for line in LOG] == [False] * 6 + [True]
    assert is_fatal("-- Deploying app 'disagg' failed with exception:")
    assert not is_fatal("-- Deploying app 'disagg'.")
    assert reason(LOG) == "RuntimeError: weights not found"
    assert reason(LOG[:1]) is None


def test_environment() -> None:
    """Telemetry is off unless asked for; the interpreter's own commands come first."""
    env = child_env({"PATH": "/usr/bin", "DO_NOT_TRACK": "0"})
    assert env["RAY_USAGE_STATS_ENABLED"] == "0"
    assert env["DO_NOT_TRACK"] == "0"
    assert env["PATH"].endswith(":/usr/bin")


def test_whose_processes() -> None:
    """Session members, adopted orphans and all descendants belong; others and ended ones do not."""
    me, root = 10, 20
    rows = [
        Process(10, 1, 10, "disagg"),
        Process(20, 10, 20, "serve"),
        Process(21, 20, 20, "raylet"),
        Process(22, 21, 22, "own session"),
        Process(23, 10, 23, "orphan"),
        Process(24, 1, 20, "same session"),
        Process(25, 20, 20, "ended", ended=True),
        Process(30, 1, 30, "other cluster"),
    ]
    found = belonging_to(root, {row.pid: row for row in rows}, me=me)
    assert sorted(process.pid for process in found) == [20, 21, 22, 23, 24]


def test_process_table(tmp_path: Path) -> None:
    """Each process is there with its parent, its session and its name, brackets in it or not, until it is collected."""
    odd = tmp_path / "a) b (c"
    shutil.copy("/bin/sleep", odd)
    child = subprocess.Popen([odd, "60"], start_new_session=True)
    try:
        assert process_table()[child.pid] == Process(child.pid, os.getpid(), child.pid, "a) b (c")
    finally:
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_table()[child.pid].ended
    child.wait()
    table = process_table()
    assert child.pid not in table
    assert (table[os.getpid()].parent, table[os.getpid()].session) == (os.getppid(), os.getsid(0))


def test_shared_memory(tmp_path: Path) -> None:
    """Only new, unused files that the run was seen using go; what may be another's stays and is named."""
    old, ours, busy, unknown = (tmp_path / name for name in ("old", "ours", "busy", "unknown"))
    for file in (old, ours, busy, unknown):
        file.write_text("x")
    with busy.open() as held:
        assert held.name in {str(file) for file in mapped_by([os.getpid()], tmp_path)}
        kept = remove_shared(frozenset({old}), frozenset({old, ours, busy}), tmp_path)
    assert kept == [unknown]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["busy", "old", "unknown"]
