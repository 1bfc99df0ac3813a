# SPDX-License-Identifier: Apache-2.0
"""Kills, stops and finds the processes of a running application, by pid alone. Linux only."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Collection, Iterator

import httpx
import psutil

from disagg.errors import ClientError
from disagg.sdk.types import Pool, Replica
from tests.support.stack import Stack, is_warm, wait_until


def pool(stack: Stack, name: str) -> Pool:
    with stack.client() as client:
        return client.pool(name).status()


def replicas(stack: Stack, name: str) -> tuple[Replica, ...]:
    """Every replica of a pool that some gateway knows, ready or not."""
    return pool(stack, name).replicas


def process_of(replica: Replica) -> psutil.Process:
    """The process that Serve runs the replica in. psutil refuses to signal another one that got the same pid later."""
    assert replica.pid is not None, f"{replica.replica_id} did not say its pid"
    return psutil.Process(replica.pid)


def engine_core(replica: Replica) -> psutil.Process:
    """The EngineCore process of a replica: a child that vLLM has titled so.

    Looked for twice: psutil once found no child of a replica that served with its engine before and after.
    """
    for _ in range(2):
        titles = {child: _title(child) for child in process_of(replica).children(recursive=True)}
        cores = [child for child, title in titles.items() if "EngineCor" in title]
        if len(cores) == 1:
            return cores[0]
        time.sleep(1)
    raise AssertionError(f"{replica.replica_id} has {len(cores)} engine cores: {[*titles.values()]}")


def family(replica: Replica) -> list[psutil.Process]:
    """The replica's process and all that descend from it."""
    process = process_of(replica)
    return [process, *process.children(recursive=True)]


def kill9(*processes: psutil.Process) -> float:
    """SIGKILL. Returns `time.monotonic()` of the first."""
    at = time.monotonic()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    return at


@contextlib.contextmanager
def stopped(*processes: psutil.Process) -> Iterator[float]:
    """SIGSTOP, and SIGCONT afterwards to those that still live. Yields `time.monotonic()` of the first."""
    at = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield at
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def gone(processes: Collection[psutil.Process], timeout_s: float = 30.0) -> list[psutil.Process]:
    """Those that still run after at most `timeout_s`. One that has ended and waits to be collected does not run."""
    deadline = time.monotonic() + timeout_s
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def wait_replaced(
    stack: Stack, name: str, lost: Collection[Replica], *, size: int, timeout_s: float = 240.0
) -> tuple[Replica, ...]:
    """The replicas of a pool once `size` are routable and none of them is one that was lost. Raises TimeoutError."""
    incarnations = {replica.incarnation for replica in lost}
    now: list[Replica] = []

    def replaced() -> bool:
        with contextlib.suppress(ClientError, httpx.HTTPError):
            found = pool(stack, name)
            now[:] = found.replicas
            return found.has_size(size) and not {replica.incarnation for replica in found.replicas} & incarnations
        return False

    wait_until(replaced, timeout_s, f"the {name} pool has {size} routable replicas, and none that was lost", 0.25)
    return tuple(now)


def wait_warm(stack: Stack, timeout_s: float = 240.0) -> None:
    """Every pair has moved KV."""
    wait_until(lambda: is_warm(stack.url), timeout_s, "every pair is warm", 0.25)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""
