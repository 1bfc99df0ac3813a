# SPDX-License-Identifier: Apache-2.0
"""The cache server's actor on a local Ray cluster: shared by replicas, back after a death, gone with its last user."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pools.cache_server.actor import CacheServerSpec, NodeCacheServer
from pools.cache_server.policy import TIMES, LeaseTimes
from pools.cache_server.probe import GET_CHUNK_SIZE, ask
from pools.errors import EngineStartError
from tests.support.stack import ROOT, free_port
from transport.lmcache_server import shm_stem
from transport.tiers import ManagedServerConfig

BACK_S = 40.0
MARK = f"TEST_CLUSTER={os.getpid()}".encode()
"""In the environment of all that this test's cluster runs."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A Ray cluster of this test, without Serve: to the actor, its application is gone as soon as nobody uses it."""
    import ray

    name, _, value = MARK.decode().partition("=")
    env_vars = {"PYTHONPATH": str(ROOT), name: value}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env_vars})
    try:
        yield
    finally:
        ray.shutdown()


def _use(user: str, times: LeaseTimes = TIMES, **settings: Any) -> NodeCacheServer:
    config = ManagedServerConfig.model_validate({"l1_gib": 0.1, "chunk_tokens": 64} | settings)
    return NodeCacheServer(
        config,
        platform="cpu",
        heartbeat_interval_s=1.0,
        host="127.0.0.1",
        application="disagg",
        user=user,
        times=times,
    )


async def _until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.1)


def _servers() -> dict[int, int]:
    """Pid of each LMCache server of this test, with the pid of its parent."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                mine = MARK in (entry / "environ").read_bytes().split(b"\0")
                if b"pools.cache_server.main" in words and b"-S" not in words and mine:
                    found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    return found


async def _answers(url: str, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                assert await ask(url, GET_CHUNK_SIZE, timeout_s=1) == 64
                return
            except TimeoutError:
                await asyncio.sleep(0.1)


async def test_one_server_for_all_replicas_of_a_node() -> None:
    """The second replica gets the first one's server; it outlives its actor's death at the same address, and goes with
    its last user, leaving no process and no shared memory."""
    before = set(_servers())
    first, second = _use("replica-1"), _use("replica-2")
    await first.start()
    await second.start()
    assert (first.url, first.http_url) == (second.url, second.http_url)
    ((server, actor),) = ((pid, parent) for pid, parent in _servers().items() if pid not in before)
    port = int(first.url.rsplit(":", 1)[1])

    os.kill(actor, signal.SIGKILL)
    await _until(lambda: server not in _servers(), 5, "the server ends with its actor")
    await _answers(first.url, BACK_S)
    ((again, _),) = ((pid, parent) for pid, parent in _servers().items() if pid not in before)
    assert again != server

    await first.stop()
    await asyncio.sleep(3)
    assert again in _servers(), "the second replica uses it"
    await second.stop()
    await _until(lambda: again not in _servers(), 15, "nobody uses it")
    stem = shm_stem(port)
    await _until(lambda: not any(f.name.startswith(stem) for f in Path("/dev/shm").iterdir()), 5, "no segment is left")


async def test_a_server_that_cannot_start_is_a_start_error() -> None:
    """The replica gets the reason, not Ray's wrapping of it, and nothing is left to restart."""
    before = set(_servers())
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        use = _use("replica-3", port=taken.getsockname()[1])
        with pytest.raises(EngineStartError, match=r"^shared_cache\.server: LMCache did not come up: .*already in use"):
            await use.start()
    await _until(lambda: set(_servers()) <= before, 15, "no server runs")


async def test_a_directory_that_cannot_be_made_is_a_start_error(tmp_path: Path) -> None:
    """The replica is told the field, whatever process noticed it."""
    (tmp_path / "file").touch()
    use = _use("replica-4", l2=[{"type": "fs", "path": str(tmp_path / "file" / "kv")}])
    with pytest.raises(EngineStartError, match=r"^shared_cache\.server\.l2\[0\]\.path: .* Not a directory"):
        await use.start()


async def test_a_replica_whose_event_loop_is_blocked_keeps_the_server() -> None:
    """As it is while an engine starts: for longer than lease and grace, after which the server would end."""
    import ray

    class Replica:
        async def start(self, times: LeaseTimes) -> str:
            self.use = _use("replica-5", times)
            await self.use.start()
            return self.use.url

        async def block(self, seconds: float) -> None:
            time.sleep(seconds)  # noqa: ASYNC251  # to block the loop is the point

        async def stop(self) -> None:
            await self.use.stop()

    before = set(_servers())
    replica: Any = ray.remote(Replica).options(num_cpus=0).remote()
    await replica.start.remote(LeaseTimes(renew_period_s=0.3, lease_s=2.0, grace_s=1.0))
    (server,) = set(_servers()) - before
    await replica.block.remote(8.0)
    assert server in _servers()
    await replica.stop.remote()
    await _until(lambda: server not in _servers(), 15, "nobody uses it")
    ray.kill(replica)


async def test_a_server_with_other_settings_waits_for_the_configured_port() -> None:
    """Until the replicas of the former settings have ended; then it starts at once, and not after a grace. A wait that
    is too long is a start error that says what to do."""
    before, port = set(_servers()), free_port()
    old, new = _use("old", port=port), _use("new", port=port, l1_gib=0.2)
    late = _use("late", LeaseTimes(port_wait_s=1.0), port=port, l1_gib=0.3)
    await old.start()
    (server,) = set(_servers()) - before
    starting = asyncio.create_task(new.start())
    with pytest.raises(
        EngineStartError, match=rf"^shared_cache\.server\.port \({port}\): in use .* leave the ports to"
    ):
        await late.start()
    assert server in _servers() and not starting.done(), "it is in use"
    await old.stop()
    async with asyncio.timeout(BACK_S):
        await starting
    assert new.url == old.url and server not in _servers()
    await new.stop()
    await _until(lambda: set(_servers()) <= before, 15, "nobody uses it")


def test_the_spec_is_json() -> None:
    """Ray keeps it for the actor's restarts, and each restart reads the same."""
    spec = CacheServerSpec(
        application="a",
        platform="cpu",
        server=ManagedServerConfig(),
        host="127.0.0.1",
        port=1,
        http_port=2,
        heartbeat_interval_s=3.0,
        times=LeaseTimes(lease_s=1.0),
    )
    assert CacheServerSpec.model_validate(spec.model_dump(mode="json")) == spec
