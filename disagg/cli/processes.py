# SPDX-License-Identifier: Apache-2.0
"""Finds, by session and descent, every process of one `disagg serve`, and what it leaves in shared memory.

Never looks at names: other Ray clusters on the machine stay untouched.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pools.process.shared_files import SHARED_MEMORY, mapped_by

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    session: int
    name: str
    ended: bool = False
    """Whether the process has ended and waits for its parent to collect it."""


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent ends, so that none of them gets out of sight."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def process_table() -> dict[int, Process]:
    """All processes by pid."""
    table = {}
    for process in psutil.process_iter():
        # It may end between two looks.
        with suppress(psutil.NoSuchProcess, ProcessLookupError), process.oneshot():
            ended = process.status() == psutil.STATUS_ZOMBIE
            session = os.getsid(process.pid)
            table[process.pid] = Process(process.pid, process.ppid(), session, process.name(), ended)
    return table


def belonging_to(root: int, table: Mapping[int, Process], *, me: int) -> list[Process]:
    """The running processes in the session of `root` and among the children of `me`, and all their descendants.

    Args:
        root: pid of a child of `me` that leads its own session.
        me: the process that adopts orphans.
    """
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    found: dict[int, Process] = {}
    queue = [process for process in table.values() if process.session == root or process.parent == me]
    while queue:
        process = queue.pop()
        if process.pid not in found and process.pid != me:
            found[process.pid] = process
            queue += children.get(process.pid, [])
    return [process for process in found.values() if not process.ended]


def collect_ended(root: int) -> None:
    """Reaps adopted children that ended. Leaves `root` to whoever started it."""
    for process in process_table().values():
        if process.parent == os.getpid() and process.ended and process.pid != root:
            with suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def remaining(root: int) -> list[Process]:
    """The processes of `root` that run, after collecting those that ended."""
    collect_ended(root)
    return belonging_to(root, process_table(), me=os.getpid())


def wait_gone(root: int, timeout_s: float) -> list[Process]:
    """Blocks until no process of `root` runs, or `timeout_s` seconds passed. Returns those that remain."""
    deadline = time.monotonic() + timeout_s
    while (left := remaining(root)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def send(processes: Iterable[Process], number: signal.Signals) -> None:
    """Sends a signal to each process that still runs."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def shared_files(directory: Path = SHARED_MEMORY) -> frozenset[Path]:
    """The files in shared memory."""
    return frozenset(directory.iterdir()) if directory.is_dir() else frozenset()


def remove_shared(before: frozenset[Path], used: frozenset[Path], directory: Path = SHARED_MEMORY) -> list[Path]:
    """Removes what this run left in shared memory, and returns new files that it keeps because they may be another's.

    Args:
        before: files that existed when the run began.
        used: files that processes of the run had mapped or open. Only these are removed, and only when nobody
            maps or opens them any more.
    """
    new = shared_files(directory) - before
    if not new:
        return []
    busy = mapped_by(process_table(), directory)
    kept = []
    for file in sorted(new):
        if file in used and file not in busy:
            with suppress(FileNotFoundError):
                file.unlink()
        elif file not in busy and file.stat().st_uid == os.getuid():
            kept.append(file)
    return kept
