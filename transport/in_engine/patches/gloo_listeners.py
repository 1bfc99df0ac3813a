# SPDX-License-Identifier: Apache-2.0
"""Closes the ports that torch's Gloo process groups leave open in an engine's processes.

Each group listens on a port of its own for its members, about twenty a worker, on the node's address. Once a group is
made all its members are connected, and the port serves nobody; but it goes on taking connections, keeps those that
send nothing for ever, and when file descriptors run out it ends the process (`gloo::EnforceNotMet` in its thread).
Source: PyTorch 2 `ProcessGroupGloo`, whose constructor ends with Gloo's `connectFullMesh`, unless it is told to connect
at the first use (`TORCH_GLOO_LAZY_INIT`).
"""

from __future__ import annotations

import functools
import os
import stat
from pathlib import Path
from typing import Any

_MARK = "_disagg_closes_its_port"
_LISTENING = "0A"
"""State of a listening socket in /proc/net/tcp."""


def close_after_connecting() -> None:
    """Make every Gloo group of this process, from here on, close its port once it is connected. Idempotent."""
    from torch.distributed.distributed_c10d import ProcessGroupGloo

    make = ProcessGroupGloo.__init__
    if hasattr(make, _MARK):
        return

    @functools.wraps(make)
    def connected(self: Any, store: Any, rank: int, size: int, *args: Any, **kwargs: Any) -> None:
        before = listening()
        make(self, store, rank, size, *args, **kwargs)
        if size == 1 or os.environ.get("TORCH_GLOO_LAZY_INIT", "0") in ("", "0"):
            close_sockets(listening() - before)

    setattr(connected, _MARK, True)
    ProcessGroupGloo.__init__ = connected


def listening() -> set[int]:
    """File descriptors of this process that listen on TCP."""
    inodes = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        if Path(table).exists():
            rows = (line.split() for line in Path(table).read_text().splitlines()[1:])
            inodes |= {int(row[9]) for row in rows if row[3] == _LISTENING}
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:
            # The one that listed the directory, or one that another thread has just closed.
            continue
        if stat.S_ISSOCK(status.st_mode) and status.st_ino in inodes:
            found.add(int(name))
    return found


def close_sockets(descriptors: set[int]) -> None:
    """End the sockets but keep their numbers taken, by /dev/null: their owners close those numbers some day."""
    if not descriptors:
        return
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for descriptor in descriptors:
            os.dup2(nothing, descriptor, inheritable=False)
    finally:
        os.close(nothing)
