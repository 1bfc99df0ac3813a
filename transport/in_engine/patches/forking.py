# SPDX-License-Identifier: Apache-2.0
"""EngineCore forks its workers on CPUs, too. A worker that is spawned imports vLLM once more.

vLLM forks them on GPUs. On CPUs it has them spawned, because it binds their OpenMP threads to cores by variables that
are read as a process starts. `pools.plan.launch` binds none, and says which engines need spawned workers all the same.

Source: vLLM 0.32 `platforms/cpu.py`, which sets the method in the replica's process, and `utils/ompmultiprocessing.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker

FORK_VARIABLE = "DISAGG_FORK_WORKERS"
"""`1` in the environment of an engine whose workers are to be forked. Set by `pools.plan.launch`."""
_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_STANDARD = (0, 1, 2)


@dataclass(frozen=True)
class _Pipe:
    """The writing end of a pipe of this process."""

    fd: int
    inode: int


def forks_workers(environment: Mapping[str, str], *, is_child: bool) -> bool:
    """Whether this process is to fork the workers of an engine, and does not do so yet. Pure.

    Args:
        environment: of this process.
        is_child: whether `multiprocessing` started this process, as it does EngineCore. The replica's process spawns
            EngineCore: it holds threads of Ray's, which no fork survives.
    """
    return is_child and environment.get(FORK_VARIABLE) == "1" and environment.get(_METHOD) != "fork"


def fork_workers(environment: MutableMapping[str, str]) -> None:
    """Make this process, which is EngineCore and has no worker yet, fork them.

    The replica's process hears of the end of EngineCore by a pipe that EngineCore alone holds open. A worker that held
    this pipe, too, would hide the end of EngineCore for as long as the worker lives, and one that hangs lives on.
    """
    environment[_METHOD] = "fork"
    os.register_at_fork(after_in_child=partial(_close, _pipes_to_the_parent()))


def _pipes_to_the_parent() -> list[_Pipe]:
    """Pipes that this process may write to, its standard streams and that to Python's resource tracker apart.

    `multiprocessing` keeps no reference to the one that tells of the end of the process.
    """
    spared = {*_STANDARD, resource_tracker.getfd()}
    found = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):  # The descriptor of the listing itself is closed by now.
            status = os.fstat(fd)
            writes = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
            if stat.S_ISFIFO(status.st_mode) and writes and fd not in spared:
                found.append(_Pipe(fd, status.st_ino))
    return found


def _close(pipes: list[_Pipe]) -> None:
    """In the child: close those that are still the same. What the child forks itself finds the list empty."""
    while pipes:
        pipe = pipes.pop()
        with contextlib.suppress(OSError):
            if os.fstat(pipe.fd).st_ino == pipe.inode:
                os.close(pipe.fd)
