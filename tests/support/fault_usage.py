# SPDX-License-Identifier: Apache-2.0
"""What a running application holds of the machine: memory, file descriptors, shared memory, KV. Linux only."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from pools.process.shared_files import SHARED_MEMORY, mapped_by
from tests.support.stack import Stack, wait_until

KINDS = ("EngineCore", "ServeReplica:disagg:gateway", "ServeReplica:disagg:prefill", "ServeReplica:disagg:decode")


@dataclass(frozen=True)
class Usage:
    """Sums over the application's processes; `by_kind` is MiB of memory by what the process is."""

    memory_mib: float
    """Memory that no process outside it shares (USS)."""
    num_fds: int
    num_processes: int
    shared_files: int
    """Files in /dev/shm that its processes have mapped or open."""
    shared_mib: float
    by_kind: dict[str, float]

    def words(self) -> str:
        return (
            f"{self.memory_mib:.0f} MiB, {self.num_fds} fds, {self.num_processes} processes, "
            f"{self.shared_files} files of {self.shared_mib:.0f} MiB in /dev/shm"
        )


def usage(stack: Stack) -> Usage:
    """What the application holds now. Call it when nothing runs."""
    root = psutil.Process(stack.process.pid)
    memory: Counter[str] = Counter()
    num_fds = num_processes = 0
    pids = []
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            title = " ".join([process.name(), *process.cmdline()])
            used = process.memory_full_info().uss / 2**20
            num_fds += process.num_fds()
            num_processes += 1
            pids.append(process.pid)
            memory[next((kind for kind in KINDS if kind in title), "other")] += used
    files = [file for file in mapped_by(pids) if file.exists()]
    shared = sum(file.stat().st_size for file in files) / 2**20
    by_kind = {kind: round(mib, 1) for kind, mib in sorted(memory.items())}
    return Usage(sum(memory.values()), num_fds, num_processes, len(files), shared, by_kind)


def unowned_shared_files(before: frozenset[Path]) -> list[Path]:
    """New files in /dev/shm that no process of the machine has mapped or open."""
    new = frozenset(SHARED_MEMORY.iterdir()) - before
    busy = mapped_by(psutil.pids())
    return sorted(file for file in new if file not in busy)


def kv_in_use(stack: Stack) -> dict[str, list[float]]:
    """Share of the KV blocks in use of each engine, by pool."""
    return {pool: [float(stats["kv_cache_usage"]) for stats in found] for pool, found in stack.stats().items()}


def wait_idle(stack: Stack, timeout_s: float = 60.0) -> bool:
    """Whether every engine came to hold no KV and to run nothing in time."""

    def idle() -> bool:
        stats = [one for found in stack.stats().values() for one in found]
        return all(
            not one["num_requests_running"] and not one["num_requests_waiting"] and one["kv_cache_usage"] < 1e-6
            for one in stats
        )

    try:
        wait_until(idle, timeout_s, "every engine is idle", 0.5)
    except TimeoutError:
        return False
    return True
