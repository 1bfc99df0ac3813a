# SPDX-License-Identifier: Apache-2.0
"""A real `lmcache server` under its supervisor, without Ray and without an engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import zmq

from pools.cache_server.probe import GET_CHUNK_SIZE, GET_EXPERIMENTAL, ask, check_external, http_get
from pools.cache_server.supervisor import CacheServer, CacheServerAddress, has_module
from pools.errors import EngineStartError
from tests.support.garbage import silence, throw_all
from tests.support.redis import PASSWORD, redis_command, redis_server
from tests.support.replaced import PYTHONPATH, listed
from tests.support.replaced import ask as replaced_in
from tests.support.stack import ROOT, free_port
from transport.lmcache_server import shm_stem
from transport.tiers import ExternalServerConfig, ManagedServerConfig

BACK_S = 60.0
"""What a restart may take here; it is 6 s on an idle machine, most of it the import of torch."""
SHARED_MEMORY = Path("/dev/shm")


def _server(
    port: int | None = None, *, host: str = "127.0.0.1", heartbeat_interval_s: float = 1.0, **settings: Any
) -> CacheServer:
    config = ManagedServerConfig.model_validate({"l1_gib": 0.1, "chunk_tokens": 64} | settings)
    address = CacheServerAddress(host, port or free_port(), free_port())
    return CacheServer(config, address, platform="cpu", heartbeat_interval_s=heartbeat_interval_s)


@asynccontextmanager
async def _running(server: CacheServer) -> AsyncIterator[CacheServer]:
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def _until(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float) -> float:
    started = time.monotonic()
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return time.monotonic() - started
        assert time.monotonic() - started < timeout_s, f"still not after {timeout_s:g} s"
        await asyncio.sleep(0.1)


async def _status(server: CacheServer) -> dict[str, Any]:
    code, body = await http_get(f"{server.address.http_url}/status", timeout_s=5)
    assert code == 200
    return json.loads(body)  # type: ignore[no-any-return]


def _segments(port: int) -> list[str]:
    return [file.name for file in SHARED_MEMORY.iterdir() if file.name.startswith(shm_stem(port))]


def _pid(server: CacheServer) -> int:
    pid = server.status()["pid"]
    assert isinstance(pid, int)
    return pid


async def test_it_comes_up_comes_back_and_leaves_nothing() -> None:
    """Healthy after its start; after SIGKILL healthy again at the same address with a new segment, no sooner than two
    heartbeats later; then gone."""
    async with _running(_server(heartbeat_interval_s=6)) as server:
        url, port = server.address.url, server.address.port
        assert await ask(url, GET_CHUNK_SIZE, timeout_s=5) == 64
        assert (await _status(server))["is_healthy"] is True
        first, segments = _pid(server), _segments(port)
        assert len(segments) == 1

        killed_at = time.monotonic()
        os.kill(first, signal.SIGKILL)
        await _until(lambda: not server.status()["healthy"], 10)
        await _until(lambda: server.status()["healthy"], BACK_S)
        took = time.monotonic() - killed_at
        print(f"back {took:.1f} s after it was killed")
        assert took >= 12
        assert server.status()["num_restarts"] == 1 and _pid(server) != first
        assert await ask(url, GET_CHUNK_SIZE, timeout_s=5) == 64
        assert len(_segments(port)) == 1 and _segments(port) != segments
        last = _pid(server)
    assert not _command_line(last)
    assert _segments(port) == []


async def test_the_http_api_answers_the_node_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints its environment, secrets included, so it does not listen at the node's address, as the queue does."""
    monkeypatch.setenv("A_CLOUD_KEY", "hunter2")
    async with _running(_server(host="127.0.0.2")) as server:
        assert await ask(f"tcp://127.0.0.2:{server.address.port}", GET_CHUNK_SIZE, timeout_s=5) == 64
        with pytest.raises(ConnectionRefusedError):
            await http_get(f"http://127.0.0.2:{server.address.http_port}/env", timeout_s=5)
        assert server.address.http_url.startswith("http://127.0.0.1:")
        _, body = await http_get(f"{server.address.http_url}/env", timeout_s=5)
        assert "hunter2" in body, "LMCache keeps it to itself; the docs may be gentler"


async def test_a_server_whose_queue_is_dead_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """One malformed message ends the queue thread of `lmcache server` itself while `/healthcheck` stays 200; what
    Python writes about it is noticed sooner than a probe could be missed."""
    monkeypatch.setattr("pools.cache_server.supervisor._PROGRAM", "lmcache.cli.main")
    async with _running(_server()) as server:
        first = _pid(server)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket_:
            socket_.linger = 1000
            socket_.connect(server.address.url)
            socket_.send(b"x")
            # One missed probe takes 3 s, and four are waited for.
            await _until(lambda: server.status()["num_restarts"] == 1, 4)
        await _until(lambda: server.status()["healthy"], BACK_S)
        assert _pid(server) != first
        assert await ask(server.address.url, GET_CHUNK_SIZE, timeout_s=5) == 64


async def test_a_server_that_cannot_start_says_why() -> None:
    """A port that is taken is a start error with LMCache's own words and the field, and nothing runs on."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = _server(port)
        with pytest.raises(EngineStartError, match=r"shared_cache\.server: .*Address already in use"):
            await server.start()
    assert server.status() == {"pid": None, "healthy": False, "num_restarts": 1}
    assert _segments(port) == []


async def test_storage_that_is_not_installed_is_refused_before_a_start() -> None:
    """The message names the field and what to install."""
    l2 = {"type": "mooncake_store", "master_server_address": "m:1", "metadata_server": "P2PHANDSHAKE"}
    server = _server(l2=[l2])
    assert not has_module("lmcache.lmcache_mooncake") and has_module("lmcache.lmcache_redis")
    with pytest.raises(EngineStartError, match=r"shared_cache\.server\.l2\[0\]\.type: .*MOONCAKE_INCLUDE_DIR"):
        await server.start()
    assert server.status()["pid"] is None


async def test_a_directory_that_cannot_be_made_is_refused_before_a_start(tmp_path: Path) -> None:
    """The message names the field and the reason."""
    (tmp_path / "file").touch()
    l2 = [{"type": "fs", "path": str(tmp_path / "kv")}, {"type": "fs", "path": str(tmp_path / "file" / "kv")}]
    server = _server(l2=l2)
    with pytest.raises(
        EngineStartError, match=r"^shared_cache\.server\.l2\[1\]\.path: .*/kv cannot be made: Not a dir"
    ):
        await server.start()
    assert server.status()["pid"] is None


async def test_a_server_does_not_outlive_its_supervisor() -> None:
    """SIGKILL of the process that runs the supervisor ends the server, and a successor clears what it left."""
    port = free_port()
    child = _supervise_and_die(port)
    # A process that nobody waits for stays as a zombie, which has no command line.
    await _until(lambda: not _command_line(child), 5)
    left = SHARED_MEMORY / f"{shm_stem(port)}left"
    left.touch()
    async with _running(_server(port)):
        assert len(_segments(port)) == 1 and not left.exists()
    assert _segments(port) == []


def _supervise_and_die(port: int) -> int:
    """Pid of a server whose supervisor was killed after it came up."""
    script = textwrap.dedent(f"""
        import asyncio
        from tests.engine.test_cache_server import _server
        async def main():
            server = _server({port})
            await server.start()
            print(server.status()["pid"], flush=True)
            await asyncio.sleep(1000)
        asyncio.run(main())
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        try:
            child = int(parent.stdout.readline())
            assert b"lmcache" in _command_line(child)
        finally:
            parent.kill()
    return child


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


async def test_files_are_storage_behind_memory(tmp_path: Path) -> None:
    """An `fs` L2 is taken up, its directory is made, and a restarted server has it again."""
    path = tmp_path / "kv" / "tier"
    async with _running(_server(l2=[{"type": "fs", "path": str(path)}])) as server:
        assert path.is_dir()
        for restarts in range(2):
            storage = (await _status(server))["storage_manager"]
            assert storage["num_l2_adapters"] == 1 and storage["l2_adapters"][0]["is_healthy"] is True
            if restarts == 0:
                os.kill(_pid(server), signal.SIGKILL)
                await _until(lambda: server.status()["num_restarts"] == 1, 3)
                await _until(lambda: server.status()["healthy"], BACK_S)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[int]:
    """Port of a Redis server of this test."""
    with redis_server(tmp_path) as port:
        yield port


async def test_redis_is_storage_behind_memory(redis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `resp` L2 logs in with the password of the environment; the password is in no argument of the server."""
    monkeypatch.setenv("KV_PASSWORD", PASSWORD)
    l2 = {"type": "resp", "host": "127.0.0.1", "port": redis, "password_env": "KV_PASSWORD"}
    async with _running(_server(l2=[l2])) as server:
        storage = (await _status(server))["storage_manager"]
        assert storage["num_l2_adapters"] == 1 and storage["l2_adapters"][0]["is_healthy"] is True
        clients = redis_command(redis, b'AUTH "open sesame"\r\nCLIENT LIST\r\n')
        assert clients.count(b"addr=") > 1, "LMCache is connected, beside this test"
        assert b"open sesame" not in _command_line(_pid(server))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[CacheServer]:
    """One server for the tests that leave it as it was. It can be asked what it has replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        async with _running(_server()) as server:
            yield server


@pytest.mark.asyncio(loop_scope="module")
async def test_the_loop_of_its_queue_is_all_that_is_replaced(shared: CacheServer) -> None:
    """What the server holds of ours in other packages is what the list says of its process."""
    assert await asyncio.to_thread(replaced_in, _pid(shared)) == listed("cache_server")


@pytest.mark.asyncio(loop_scope="module")
async def test_garbage_and_silence_do_not_end_the_queue(shared: CacheServer) -> None:
    """Of which one message ends LMCache's own thread; nor do more connections than the usual limit of descriptors."""
    first = _pid(shared)
    await asyncio.to_thread(throw_all, shared.address.host, shared.address.port)
    assert await ask(shared.address.url, GET_CHUNK_SIZE, timeout_s=5) == 64
    with silence(shared.address.host, shared.address.port, 1500) as connections:
        assert len(connections) == 1500
        assert await ask(shared.address.url, GET_CHUNK_SIZE, timeout_s=5) == 64
    assert _pid(shared) == first and shared.status()["num_restarts"] == 0


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "tcp://127.0.0.1:{nobody}"}, r"shared_cache\.server\.url: no LMCache server answers at tcp"),
        ({"url": "tcp://127.0.0.1:{http}"}, r"shared_cache\.server\.url: "),
        ({"chunk_tokens": 256}, r"shared_cache\.server\.chunk_tokens is 256, .* --chunk-size 64"),
        ({"http_url": "http://127.0.0.1:{nobody}"}, r"shared_cache\.server\.http_url: .* does not answer"),
    ],
    ids=["nobody", "not a queue", "another chunk size", "no http"],
)
async def test_an_external_server_that_does_not_fit_is_refused(
    settings: dict[str, Any], message: str, shared: CacheServer
) -> None:
    """Each refusal names the field and ends within seconds; the same server with the right settings is accepted."""
    ports = {"nobody": free_port(), "http": shared.address.http_port}
    good = {"type": "external", "url": shared.address.url, "chunk_tokens": 64, "http_url": shared.address.http_url}
    bad = {key: value.format(**ports) if isinstance(value, str) else value for key, value in settings.items()}
    await check_external(ExternalServerConfig.model_validate(good))
    started = time.monotonic()
    with pytest.raises(EngineStartError, match=message):
        await check_external(ExternalServerConfig.model_validate(good | bad))
    assert time.monotonic() - started < 12


async def test_an_older_external_server_is_refused() -> None:
    """One that knows its chunk size but not all requests of this version is refused by name."""
    port = free_port()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.bind(f"tcp://127.0.0.1:{port}")
        config = ExternalServerConfig(type="external", url=f"tcp://127.0.0.1:{port}", chunk_tokens=64)
        check = asyncio.create_task(check_external(config))
        while not check.done():
            await asyncio.sleep(0.05)
            if router.poll(0):
                identity, uid, operation = router.recv_multipart()
                if msgspec.msgpack.decode(operation) == GET_CHUNK_SIZE:
                    router.send_multipart([identity, uid, operation, msgspec.msgpack.encode(64)])
        with pytest.raises(EngineStartError, match="does not know all requests of LMCache"):
            await check


def test_the_operations_are_those_of_the_installed_lmcache() -> None:
    """The two numbers that the probe sends are frozen in LMCache under these names."""
    from lmcache.v1.multiprocess.transport.zmq_impl.wire import LEGACY_OPERATION_IDS

    assert LEGACY_OPERATION_IDS["get_chunk_size"] == GET_CHUNK_SIZE
    assert LEGACY_OPERATION_IDS["get_experimental"] == GET_EXPERIMENTAL
    assert max(LEGACY_OPERATION_IDS.values()) <= 33, "a newer request is known; ask for that one instead"
