# SPDX-License-Identifier: Apache-2.0
"""How EngineCore starts its workers, and that its end is heard of while they live."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from multiprocessing.connection import Connection

import pytest

from pools.config import CpuConfig
from pools.plan.launch import engine_env
from transport.in_engine.patches.forking import fork_workers, forks_workers
from transport.upstream.names import Platform

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


@pytest.mark.parametrize(
    ("platform", "is_child", "more", "forks"),
    [
        ("cpu", True, {METHOD: "spawn"}, True),
        ("cpu", True, {METHOD: "fork"}, False),
        ("cpu", False, {}, False),
        ("cuda", True, {}, False),
        ("cpu", True, {"VLLM_CPU_OMP_THREADS_BIND": "auto"}, False),
    ],
    ids=["EngineCore on a CPU", "a second time", "the replica's process", "another platform", "bound threads"],
)
def test_which_process_forks_workers(platform: Platform, is_child: bool, more: dict[str, str], forks: bool) -> None:
    """EngineCore of an engine that a replica launches on a CPU, once. Elsewhere vLLM decides."""
    environment = engine_env("cpu", CpuConfig(), host="127.0.0.1") | more
    assert forks_workers(environment, platform, is_child=is_child) is forks


def test_a_worker_does_not_hide_the_end_of_engine_core() -> None:
    """The process above hears at once that EngineCore is gone, whatever its worker does."""
    reader, writer = multiprocessing.Pipe()  # Two sockets: a pipe of EngineCore is what its workers may not hold.
    core = multiprocessing.get_context("spawn").Process(target=_core, args=(writer,))
    core.start()
    writer.close()
    worker = reader.recv()
    try:
        assert multiprocessing.connection.wait([core.sentinel], timeout=5) == [core.sentinel]
        os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)
        core.join()


def _core(writer: Connection) -> None:
    environment = {METHOD: "spawn"}
    fork_workers(environment)
    assert environment[METHOD] == "fork"
    worker = os.fork()
    if worker == 0:
        # Its own children leave alone what it has under the same numbers.
        mine = [os.dup(0) for _ in range(64)]
        if os.fork() == 0:
            os._exit(0 if all(_is_open(fd) for fd in mine) else 1)
        _, status = os.wait()
        writer.send(os.getpid() if status == 0 else None)
        time.sleep(60)
        os._exit(0)
    time.sleep(0.5)
    os._exit(0)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
