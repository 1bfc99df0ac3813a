# SPDX-License-Identifier: Apache-2.0
"""The control routes beside an engine's own app: what waits, and what ends the waiting."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pools.client.routes import ENGINE_KEY_HEADER
from pools.config import FakeEngineConfig
from pools.engine.base import Role
from pools.engine.fake.engine import FakeEngine
from pools.replica.server import EngineServer, OpenRequests, unwatched
from pools.testing.client import open_request, request
from tests.support.garbage import kinds, silence, still_open, throw
from transport.bounded_http import HttpLimits


@asynccontextmanager
async def served(role: Role = "prefill", **fields: Any) -> AsyncIterator[tuple[FakeEngine, EngineServer]]:
    engine = FakeEngine("e", role, FakeEngineConfig(type="fake", **fields), model_id="tiny")
    await engine.start()
    server = EngineServer(
        engine, role=role, host="127.0.0.1", incarnation="i1", health=unwatched, requests=OpenRequests()
    )
    await server.start()
    try:
        yield engine, server
    finally:
        await server.stop()
        await engine.shutdown()


async def test_events_come_as_they_happen() -> None:
    """A waiting reader gets an event at once; one that is behind gets all since its number."""
    async with served() as (engine, server):
        waiting = asyncio.create_task(request("GET", f"{server.url}/disagg/v1/events?after=0&wait_s=30"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        engine.events.append({"kind": "unread", "at": 1.0, "id": "g-1"})
        news = (await asyncio.wait_for(waiting, 2)).json()
        assert news == {
            "incarnation": "i1",
            "next": 1,
            "lost": 0,
            "events": [{"kind": "unread", "at": 1.0, "id": "g-1"}],
        }
        engine.events.append({"kind": "unread", "at": 2.0, "id": "g-2"})
        for after, ids in ((0, ["g-1", "g-2"]), (1, ["g-2"]), (2, [])):
            batch = (await request("GET", f"{server.url}/disagg/v1/events?after={after}")).json()
            assert [event["id"] for event in batch["events"]] == ids


async def test_a_stopping_server_keeps_no_reader_waiting() -> None:
    """Long polls end with the server, so that a replica stops at once."""
    async with served() as (_, server):
        waiting = asyncio.create_task(request("GET", f"{server.url}/disagg/v1/events?after=0&wait_s=30"))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await server.stop()
        assert time.monotonic() - began < 2
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            assert (await waiting).json()["events"] == []


async def test_a_reader_that_leaves_is_forgotten() -> None:
    """A long poll whose caller is gone does not go on."""
    async with served() as (_, server):
        waiting = asyncio.create_task(request("GET", f"{server.url}/disagg/v1/events?after=0&wait_s=30"))
        await asyncio.sleep(0.05)
        assert len(server._polls) == 1
        waiting.cancel()
        async with asyncio.timeout(2):
            while server._polls:
                await asyncio.sleep(0.005)


async def test_a_probe_whose_caller_leaves_stops() -> None:
    """A probe that waits for the engine ends with its connection, and its hand-off is told as unread."""
    async with served("decode", prefill_ms_per_1k_tokens=1e6) as (engine, server):
        body = {"prompt_token_ids": list(range(64))}
        waiting = asyncio.create_task(_probe(server.url, body))
        async with asyncio.timeout(2):
            while not engine.stats().num_requests_running:
                await asyncio.sleep(0.005)
            waiting.cancel()
            while engine.stats().num_requests_running:
                await asyncio.sleep(0.005)


async def _probe(url: str, body: Any) -> None:
    async with open_request("POST", f"{url}/disagg/v1/probe", body):
        pass


@pytest.mark.parametrize("body", [{}, {"handoff_ids": None}, {"handoff_ids": "g-1"}, {"handoff_ids": [""]}, []])
async def test_settle_wants_ids(body: Any) -> None:
    """Anything but a list of ids is refused."""
    async with served() as (_, server):
        assert (await request("POST", f"{server.url}/disagg/v1/settle", body)).status == 400


async def test_there_is_no_release() -> None:
    """Giving back through a decode engine is no route."""
    async with served("decode") as (_, server):
        assert (await request("POST", f"{server.url}/disagg/v1/release", {"kv_transfer_params": {}})).status == 404


async def test_a_drain_waits_for_gateways_that_may_still_send() -> None:
    """It wakes their reads and ends once each has said that it is done, not before."""
    async with served() as (_, server):
        events = f"{server.url}/disagg/v1/events?after=0&wait_s=30&reader=g1"
        reading = asyncio.create_task(request("GET", f"{events}&done=0"))
        await until_polled(server)
        draining = asyncio.create_task(server.drain(10))
        assert (await asyncio.wait_for(reading, 2)).status == 200
        await request("GET", f"{events}&done=0")
        assert not draining.done()
        await request("GET", f"{events}&done=1")
        assert await asyncio.wait_for(draining, 2)


async def test_a_drain_waits_for_nobody_who_is_gone() -> None:
    """A gateway whose connection breaks says nothing more."""
    async with served() as (_, server):
        reading = asyncio.create_task(request("GET", f"{server.url}/disagg/v1/events?wait_s=30&reader=g1&done=0"))
        await until_polled(server)
        reading.cancel()
        async with asyncio.timeout(2):
            while server._polls:
                await asyncio.sleep(0.005)
        assert await asyncio.wait_for(server.drain(10), 2)


async def test_a_drain_has_an_end() -> None:
    """Only requests that are cut make it a failure."""
    async with served() as (_, server):
        await request("GET", f"{server.url}/disagg/v1/events?reader=g1&done=0")
        assert await server.drain(0.1)


async def test_the_last_events_are_read_before_the_end() -> None:
    """A replica knows whether every gateway has taken its last event."""
    async with served() as (engine, server):
        events = f"{server.url}/disagg/v1/events?reader=g1&done=1"
        await request("GET", f"{events}&after=0")
        engine.events.append({"kind": "unread", "at": 1.0, "id": "g-1"})
        assert not await server.told(0.1)
        await request("GET", f"{events}&after=1")
        assert await server.told(0.1)


async def until_polled(server: EngineServer) -> None:
    async with asyncio.timeout(2):
        while not server._polls:
            await asyncio.sleep(0.005)


async def test_a_probe_uses_the_caches_of_its_salt() -> None:
    """What one salt's probe left is found with that salt and with no other; a salt that is none is refused."""
    async with served("decode") as (_, server):

        async def cached(salt: object) -> int:
            body = {"prompt_token_ids": list(range(64)), "cache_salt": salt}
            return int((await request("POST", f"{server.url}/disagg/v1/probe", body)).json()["num_cached_tokens"])

        assert [await cached(salt) for salt in ("a", "a", "b", None, "b")] == [0, 48, 0, 0, 48]
        for salt in ("", 1, ["a"]):
            body = {"prompt_token_ids": [1], "cache_salt": salt}
            assert (await request("POST", f"{server.url}/disagg/v1/probe", body)).status == 400


@pytest.mark.parametrize(
    ("path", "key", "status", "stays"),
    [
        ("/health", None, 200, False),
        ("/metrics", None, 200, False),
        ("/disagg/v1/stats", None, 401, False),
        ("/disagg/v1/stats", "wrong", 401, False),
        ("/disagg/v1/stats", "right", 200, True),
        ("/health", "right", 200, True),
    ],
)
async def test_who_has_no_key_takes_nobodys_place(path: str, key: str | None, status: int, stays: bool) -> None:
    """Without the key a connection ends with its answer; with it, it stays and counts as served."""
    engine = FakeEngine("e", "prefill", FakeEngineConfig(type="fake"), model_id="tiny")
    await engine.start()
    server = EngineServer(
        engine,
        role="prefill",
        host="127.0.0.1",
        incarnation="i1",
        key="right",
        health=unwatched,
        requests=OpenRequests(),
    )
    await server.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        header = f"{ENGINE_KEY_HEADER}: {key}\r\n" if key else ""
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n{header}\r\n".encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert (b"connection: close" in head) == (not stays)
        if stays:
            assert not server._protocol.door._silent
        else:
            await asyncio.wait_for(reader.read(), 5)
        writer.close()
    finally:
        await server.stop()
        await engine.shutdown()


async def test_the_private_port_survives_garbage_and_silence() -> None:
    """Every kind of garbage and more silent connections than it takes: requests go on, and what was closed is told."""
    engine = FakeEngine("e", "prefill", FakeEngineConfig(type="fake"), model_id="tiny")
    await engine.start()
    limits = HttpLimits(head_s=0.2, body_s=0.2, max_connections=20)
    server = EngineServer(
        engine,
        role="prefill",
        host="127.0.0.1",
        incarnation="i1",
        limits=limits,
        health=unwatched,
        requests=OpenRequests(),
    )
    await server.start()
    try:
        port = int(server.url.rsplit(":", 1)[1])
        for data in itertools.chain.from_iterable(kinds().values()):
            await asyncio.to_thread(throw, "127.0.0.1", port, data, wait_s=0.01)
        with silence("127.0.0.1", port, 60) as connections:
            stats = (await request("GET", f"{server.url}/disagg/v1/stats")).json()
            assert stats["num_requests_in_flight"] == 0
            async with asyncio.timeout(5):
                while still_open(connections):
                    await asyncio.sleep(0.02)
        closed = (await request("GET", f"{server.url}/disagg/v1/stats")).json()["num_connections_closed_total"]
        assert closed >= 60
        assert (await request("POST", f"{server.url}/disagg/v1/settle", {"handoff_ids": []})).status == 200
    finally:
        await server.stop()
        await engine.shutdown()
