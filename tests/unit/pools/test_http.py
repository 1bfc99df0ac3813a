# SPDX-License-Identifier: Apache-2.0
"""The control routes beside an engine's own app: what waits, and what ends the waiting."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pools.config import FakeEngineConfig
from pools.engine.base import Role
from pools.engine.fake import FakeEngine
from pools.http import EngineServer
from pools.testing_client import open_request, request


@asynccontextmanager
async def served(role: Role = "prefill", **fields: Any) -> AsyncIterator[tuple[FakeEngine, EngineServer]]:
    engine = FakeEngine("e", role, FakeEngineConfig(type="fake", **fields), model_id="tiny")
    await engine.start()
    server = EngineServer(engine, role=role, host="127.0.0.1", incarnation="i1")
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
