# SPDX-License-Identifier: Apache-2.0
"""How EngineCore starts its workers, and that its end is heard of while they live."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest

from pools.config import CpuConfig
from pools.plan import launch
from pools.plan.launch import engine_env
from transport.in_engine.patches import forking
from transport.in_engine.patches.forking import fork_workers, forks_workers
from transport.upstream.names import Platform

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


@pytest.mark.parametrize(
    ("platform", "kwargs", "given", "is_child", "forks"),
    [
        ("cpu", {}, {}, True, True),
        ("cpu", {}, {METHOD: "fork"}, True, False),
        ("cpu", {}, {}, False, False),
        ("cuda", {}, {}, True, False),
        ("cpu", {}, {METHOD: "spawn"}, True, False),
        ("cpu", {"otlp_traces_endpoint": "grpc://127.0.0.1:4317"}, {}, True, False),
        ("cpu", {"numa_bind": True}, {}, True, False),
        ("cpu", {"mm_tensor_ipc": "torch_shm"}, {}, True, False),
    ],
    ids=["EngineCore", "twice", "the replica", "a GPU", "the user's wish", "tracing", "NUMA nodes", "shared tensors"],
)
def test_which_process_forks_workers(
    platform: Platform, kwargs: dict[str, Any], given: dict[str, str], is_child: bool, forks: bool
) -> None:
    """EngineCore of an engine that a replica launches on a CPU, once, where nothing needs spawned workers."""
    env = engine_env(platform, CpuConfig(), host="127.0.0.1", engine_kwargs=kwargs, given=given)
    assert forks_workers(given | env, is_child=is_child) is forks


def test_both_packages_spell_the_variable_alike() -> None:
    """The one that sets it cannot import the one that reads it."""
    assert launch.FORK_VARIABLE == forking.FORK_VARIABLE


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
