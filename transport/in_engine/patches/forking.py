# SPDX-License-Identifier: Apache-2.0
"""EngineCore forks its workers on CPUs, too. A worker that is spawned imports vLLM once more.

vLLM forks them on GPUs. On CPUs it has them spawned, because it binds their OpenMP threads to cores by variables that
are read as a process starts; `pools.plan.launch` binds none.

Source: vLLM 0.32 `platforms/cpu.py`, which sets the method in the replica's process, and `utils/ompmultiprocessing.py`.
"""

from __future__ import annotations

import fcntl
import functools
import os
import stat
from collections.abc import Mapping, MutableMapping
from multiprocessing import resource_tracker

from transport.upstream.names import Platform

_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_STANDARD = (0, 1, 2)


def forks_workers(environment: Mapping[str, str], platform: Platform, *, is_child: bool) -> bool:
    """Whether this process is to fork the workers of an engine. Pure.

    Args:
        environment: of this process.
        is_child: whether `multiprocessing` started this process, as it does EngineCore. The replica's process spawns
            EngineCore: it holds threads of Ray's, which no fork survives.
    """
    unbound = environment.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind"
    return platform == "cpu" and is_child and unbound and environment.get(_METHOD) != "fork"


def fork_workers(environment: MutableMapping[str, str]) -> None:
    """Make this process, which is EngineCore and has no worker yet, fork them.

    The replica's process hears of the end of EngineCore by a pipe that EngineCore alone holds open. A worker that held
    it, too, would hide that end for as long as it lives, and one that hangs lives on.
    """
    environment[_METHOD] = "fork"
    os.register_at_fork(after_in_child=functools.partial(_close, _pipes_to_the_parent()))


def _pipes_to_the_parent() -> list[int]:
    """Pipes that this process may write to, its standard streams and that to Python's resource tracker apart."""
    spared = {*_STANDARD, resource_tracker.getfd()}
    found = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        except OSError:
            continue  # That of the listing itself.
        if is_pipe and flags & os.O_ACCMODE == os.O_WRONLY and fd not in spared:
            found.append(fd)
    return found


def _close(fds: list[int]) -> None:
    while fds:  # What this process forks itself inherits the list, and other things under these numbers.
        os.close(fds.pop())
