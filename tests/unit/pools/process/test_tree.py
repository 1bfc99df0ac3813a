# SPDX-License-Identifier: Apache-2.0
"""Descendants are killed, also stopped ones, and nobody else."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil

from pools.process.tree import cpu_seconds, kill_descendants
from tests.support.stack import wait_until

PARENT = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_stopped_descendants_are_killed() -> None:
    """A stopped grandchild goes, its parent too; the process at the top and its other children stay."""
    other = subprocess.Popen(["sleep", "60"])
    child = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        grandchild = psutil.Process(int(child.stdout.readline()))
        grandchild.send_signal(signal.SIGSTOP)
        assert kill_descendants(child.pid) == [grandchild.pid]
        # Its parent, which waits for nobody, leaves it a zombie.
        wait_until(lambda: not _runs(grandchild), 5, "the grandchild has ended", 0.01)
        assert child.poll() is None and other.poll() is None
    finally:
        for process in (child, other):
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def test_nobody_there() -> None:
    """A process that is gone has no descendants."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert kill_descendants(gone.pid) == []


def test_cpu_seconds() -> None:
    """What a grandchild computes counts; a stopped one uses none."""
    spins = "import subprocess, sys; print(subprocess.Popen(['sh', '-c', 'while :; do :; done']).pid, flush=True)"
    spins += "; sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", spins], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    grandchild = psutil.Process(int(child.stdout.readline()))
    try:
        before = cpu_seconds()
        while cpu_seconds() < before + 0.05:
            time.sleep(0.01)
        grandchild.send_signal(signal.SIGSTOP)
        while grandchild.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        stopped = cpu_seconds(child.pid)
        time.sleep(0.1)
        assert cpu_seconds(child.pid) == stopped > 0
    finally:
        grandchild.kill()
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
