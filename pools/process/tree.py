# SPDX-License-Identifier: Apache-2.0
"""The processes that a process has started, found by id and descent alone: their CPU time, and how to kill them."""

from __future__ import annotations

import contextlib
import os

import psutil


def cpu_seconds(pid: int | None = None) -> float:
    """CPU seconds that the descendants of `pid` (this process by default) have used, in all their threads. Reads all of
    `/proc`: some milliseconds."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid if pid is not None else os.getpid()).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def kill_descendants(pid: int | None = None) -> list[int]:
    """SIGKILL every descendant of `pid` (this process by default), and nothing else. Returns the killed ids.

    A stopped child does not notice that its parent ends, and would keep its memory for good. Parents are killed
    before their children, so that none can start another one meanwhile.
    """
    try:
        found = psutil.Process(pid if pid is not None else os.getpid()).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    killed: list[int] = []
    for process in found:
        # psutil compares the start time, so that an id that was given out again is left alone.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            killed.append(process.pid)
    return killed
