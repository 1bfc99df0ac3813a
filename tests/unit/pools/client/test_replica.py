# SPDX-License-Identifier: Apache-2.0
"""The client of a replica: against the server of one, and against a server that writes what each test says."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pools.client.events import HoldEnded, Produced
from pools.client.registry import ReplicaClients
from pools.client.replica import NO_TRACE, Limits, ReplicaClient
from pools.client.routes import COMPLETIONS
from pools.config import FakeEngineConfig
from pools.engine.base import HANDOFF_HEADER, Role
from pools.engine.fake.engine import FakeEngine
from pools.errors import ReplicaLostError, UnusableAnswerError
from pools.replica.server import EngineServer, OpenRequests, unwatched
from tests.support.gateway_stack import until
from transport.handoff_params import HANDOFF_ID, offer_params

ROOT = Path(__file__).resolve().parents[4]
TRACE = {"traceparent": "00-a-b-01", "tracestate": "x=y"}
PROMPT = list(range(1000, 1040))
LIMITS = Limits(first_byte_timeout_s=0.05, idle_timeout_s=0.05, stall_timeout_s=0.05)
Call = Callable[[ReplicaClient], Awaitable[Any]]


class Heard:
    """Remembers what it is told of legs, without the times."""

    def __init__(self) -> None:
        self.legs: list[tuple[str, str]] = []

    def leg_over(self, kind: str, outcome: str, seconds: float) -> None:
        assert seconds >= 0
        self.legs.append((kind, outcome))


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 1, **fields}).encode()


@asynccontextmanager
async def replica(role: Role, **fields: Any) -> AsyncIterator[tuple[FakeEngine, ReplicaClient]]:
    """A fake engine behind a replica's server, and a client that has its key."""
    engine = FakeEngine(f"e-{role}", role, FakeEngineConfig(type="fake", **fields), model_id="tiny")
    await engine.start()
    server = EngineServer(
        engine, role=role, host="127.0.0.1", incarnation="i1", key="secret", health=unwatched, requests=OpenRequests()
    )
    client = ReplicaClient(await server.start(), key="secret", connect_timeout_s=1, observer=None)
    try:
        yield engine, client
    finally:
        client.close()
        await server.stop()
        await engine.shutdown()


@asynccontextmanager
async def scripted(answer: bytes | None) -> AsyncIterator[tuple[ReplicaClient, list[str], Heard]]:
    """A server that gives every request this answer, or none, what it was sent, and what the observer heard."""
    heads: list[str] = []
    heard = Heard()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                heads.append(head)
                length = re.search(r"content-length: (\d+)", head)
                await reader.readexactly(int(length.group(1)) if length else 0)
                if answer is not None:
                    writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    clients = ReplicaClients(connect_timeout_s=5, limits=LIMITS, observer=heard)
    client = clients.of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", key="secret")
    try:
        yield client, heads, heard
    finally:
        client.close()
        client.fail(ReplicaLostError("the test is over"))
        server.close()


def answering(payload: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status,
        len(payload),
        payload,
    )


async def test_a_handoff_from_replica_to_replica() -> None:
    """A prefill leg offers KV, the decode leg streams with it, and the engines' events tell its fate."""
    async with replica("prefill") as (prefill, to_prefill), replica("decode") as (_, to_decode):
        offer = offer_params("h-1")
        reply = await to_prefill.prefill(body(kv_transfer_params=offer), leg_id="h-1", trace=TRACE, timeout_s=5)
        assert reply.complete and reply.params is not None
        taken = {**reply.params, HANDOFF_ID: "h-1"}
        leg = await to_decode.decode(
            COMPLETIONS,
            body(kv_transfer_params=taken, max_tokens=4, stream=True),
            request_id="r",
            trace=TRACE,
            handoff_id="h-1",
        )
        assert leg.status == 200 and leg.content.startswith(b"data: ") and leg.exchange is not None
        rest = await leg.exchange.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        leg.close()
        leg.close()
        await until(lambda: prefill.events.newest == 2)
        events = await to_prefill.events(0, wait_s=0)
        assert [type(event) for event in events.events] == [Produced, HoldEnded]
        assert (events.incarnation, events.next, events.lost, events.draining) == ("i1", 2, 0, False)


async def test_what_else_it_can_say() -> None:
    """Probes, settling, aborting, health, statistics and passed-on routes, each with its own typed answer."""
    async with replica("prefill") as (engine, client):
        probed = await client.probe(PROMPT, offer_params("h-1"), trace=NO_TRACE, timeout_s=5)
        assert probed.num_cached_tokens == 0 and probed.kv_transfer_params is not None
        again = await client.probe(PROMPT, None, trace=NO_TRACE, timeout_s=5, asked={"cache_salt": "other"})
        assert again.num_cached_tokens == 0 and again.kv_transfer_params is None
        await client.settle(["h-1"])
        await until(lambda: engine.events.newest == 2)
        assert await client.abort("nobody") is False
        health = await client.health(timeout_s=5)
        assert (health.incarnation, health.state) == ("i1", "ok")
        stats = await client.stats()
        assert (stats.engine_id, stats.role, stats.incarnation, stats.prompt_tokens_total) == (
            "e-prefill",
            "prefill",
            "i1",
            2 * len(PROMPT),
        )
        forwarded = await client.forward("POST", "/tokenize", b'{"model": "tiny", "prompt": "a b"}', timeout_s=5)
        assert forwarded.status == 200 and len(json.loads(forwarded.payload)["tokens"]) > 0


async def test_every_leg_carries_the_trace() -> None:
    """Trace context and the engine's key are on prefill, decode and probe alike."""
    payload = json.dumps({"num_cached_tokens": 3, "choices": []}).encode()
    async with scripted(answering(payload)) as (client, heads, _):
        await client.prefill(body(), leg_id="h-1", trace=TRACE, timeout_s=5)
        (await client.decode(COMPLETIONS, body(), request_id="r", trace=TRACE, handoff_id="h-1")).close()
        await client.probe(PROMPT, None, trace=TRACE, timeout_s=5)
        assert len(heads) == 3
        for head in heads:
            assert "traceparent: 00-a-b-01\r\n" in head and "tracestate: x=y\r\n" in head
            assert "x-disagg-engine-key: secret\r\n" in head
        assert "x-request-id: h-1\r\n" in heads[0] and "x-request-id: r\r\n" in heads[1]
        assert [HANDOFF_HEADER in head for head in heads] == [False, True, False]


ASKED: dict[str, Call] = {
    "health": lambda client: client.health(timeout_s=5),
    "stats": lambda client: client.stats(),
    "events": lambda client: client.events(0, wait_s=0),
    "probe": lambda client: client.probe(PROMPT, None, trace=NO_TRACE, timeout_s=5),
    "settle": lambda client: client.settle(["h"]),
    "abort": lambda client: client.abort("r"),
}


@pytest.mark.parametrize("call", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize(
    ("status", "payload"), [(503, b'{"error": {}}'), (200, b"{"), (200, b"[]"), (200, b"\xff"), (200, b"{}")]
)
async def test_an_answer_that_is_none(call: Call, status: int, payload: bytes) -> None:
    """Another status and what cannot be decoded are one error, which keeps the status and names the replica."""
    async with scripted(answering(payload, status)) as (client, _, _):
        with pytest.raises(UnusableAnswerError, match=re.escape(client.url)) as raised:
            await call(client)
        assert raised.value.status == status


async def test_legs_are_observed() -> None:
    """The observer is told once of each leg, how it went."""
    fault = b'data: {"error": {"message": "dead", "code": 500}}\n\n'
    stream = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n%b" % (len(fault), fault)
    async with scripted(answering(b"{}")) as (client, _, heard):
        await client.prefill(body(), leg_id="h", trace=NO_TRACE, timeout_s=5)
        await client.check(body(), leg_id="c", timeout_s=5)
        (await client.decode(COMPLETIONS, body(), request_id="r", trace=NO_TRACE)).close()
        assert heard.legs == [("prefill", "answered"), ("check", "answered"), ("decode", "answered")]
    async with scripted(stream) as (client, _, heard):
        with pytest.raises(ReplicaLostError, match="before its first token"):
            await client.decode(COMPLETIONS, body(), request_id="r", trace=NO_TRACE)
        assert heard.legs == [("decode", "lost")]
    async with scripted(None) as (client, heads, heard):
        leg = asyncio.ensure_future(client.decode(COMPLETIONS, body(), request_id="r", trace=NO_TRACE))
        await until(lambda: heads)
        leg.cancel()
        await asyncio.wait({leg})
        assert heard.legs == [("decode", "given_up")]
        with pytest.raises(ReplicaLostError, match="did not answer"):
            await client.prefill(body(), leg_id="h", trace=NO_TRACE, timeout_s=0.02)
        assert heard.legs[1:] == [("prefill", "lost")]


async def test_a_closed_client_is_watched_to_its_end() -> None:
    """What runs at a replica that left is failed when it stands still, and the client is forgotten then."""
    async with scripted(None) as (lonely, heads, _):
        clients = ReplicaClients(connect_timeout_s=1, limits=LIMITS, observer=None)
        client = clients.of(lonely.url, key=None)
        leg = asyncio.ensure_future(client.decode(COMPLETIONS, body(), request_id="r", trace=NO_TRACE))
        await until(lambda: heads)
        client.close()
        now = asyncio.get_running_loop().time()
        clients.sweep(now)
        assert clients._clients == {client}
        clients.sweep(now + 1)
        with pytest.raises(ReplicaLostError, match="sent nothing"):
            await leg
        clients.sweep(now + 1)
        assert not clients._clients


def test_one_module_spells_the_paths() -> None:
    """No other module of the packages has a path of a replica's control routes as a string of code."""
    spelled = re.compile(r'''^(?!\s*"""|.*`).*["'{}]/disagg/v1''', re.MULTILINE)
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("disagg", "pools", "transport")
        for path in (ROOT / package).rglob("*.py")
        if spelled.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"pools/client/routes.py"}
