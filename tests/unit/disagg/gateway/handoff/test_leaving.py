# SPDX-License-Identifier: Apache-2.0
"""Clients that leave: both legs stop, nothing stays held, and unread KV is given back once, on both transports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pools.client import http1 as wire
from pools.engine.base import Message, Receive, Scope, Send
from tests.support.gateway_stack import JSON_HEADERS, MODEL, Stack, connected, request_bytes, running_stack, until

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": "long " * 40}),
    "streamed completion": ("/v1/completions", {"prompt": "long " * 40, "stream": True}),
    "streamed chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 99}], "stream": True}),
    "several choices": ("/v1/completions", {"prompt": "long " * 40, "stream": True, "n": 3}),
    "prompt list": ("/v1/completions", {"prompt": ["long " * 40, "longer " * 40, "longest " * 40]}),
}
KINDS = pytest.mark.parametrize("kind", BODIES)
SINGLE = pytest.mark.parametrize("kind", ["completion", "streamed completion", "streamed chat"])
TRANSPORTS = pytest.mark.parametrize("transport", ["nixl", "nixl-push", "mooncake"])


async def leave_when(stack: Stack, kind: str, is_time: Any, **fields: Any) -> None:
    """Send a request and break the connection once `is_time()`; returns when the gateway has let go of it."""
    path, body = BODIES[kind]
    num_others = stack.gateway.in_flight.num
    payload = json.dumps({"model": MODEL, "max_tokens": 1000, **body, **fields}).encode()
    async with connected(stack.url) as connection:
        connection.writer.write(request_bytes("POST", path, JSON_HEADERS, payload))
        await until(is_time)
        connection.leave()
    await until(lambda: stack.gateway.in_flight.num <= num_others)


async def check_settled(stack: Stack) -> None:
    """Nothing runs, nothing is held, the gateway counts nothing, and every hand-off has ended once."""
    background = stack.gateway.background
    await until(lambda: background._tasks == background._loops)
    await stack.settled()
    for member in stack.gateway.membership.members("prefill") + stack.gateway.membership.members("decode"):
        assert member.num_in_flight == 0
    for replica in stack.prefill:
        produced, ended = ([event["id"] for event in replica.engine.happened(kind)] for kind in ("produced", "ended"))
        assert sorted(produced) == sorted(ended) and len(set(ended)) == len(ended)
        assert len(set(replica.engine.settled)) == len(replica.engine.settled)
    ledger = stack.gateway.ledger
    await until(lambda: ledger.totals["produced"].count == sum(len(r.engine.outcomes) for r in stack.prefill))
    await until(lambda: ledger.num_open == 0)
    assert ledger.balanced


def outcomes(stack: Stack) -> list[str]:
    return [outcome for replica in stack.prefill for outcome in replica.engine.outcomes]


@KINDS
async def test_before_the_legs(kind: str) -> None:
    """While the prompt is rendered: no leg starts."""
    async with running_stack() as stack:

        async def never() -> None:
            await asyncio.Event().wait()

        stack.renderer.before = never
        await leave_when(stack, kind, lambda: stack.gateway.bodies.num_bytes > 0 and stack.gateway.in_flight.num == 1)
        await check_settled(stack)
        assert stack.gateway.bodies.num_bytes == 0
        assert not stack.prefill[0].engine.seen and not stack.decode[0].engine.seen


def served_by(task: asyncio.Task[Any]) -> str | None:
    """URL of the server whose request the task runs; None for other tasks."""
    coroutine: Any = task.get_coro()
    if not coroutine.__qualname__.endswith("RequestResponseCycle.run_asgi"):
        return None
    host, port = coroutine.cr_frame.f_locals["self"].scope["server"]
    return f"http://{host}:{port}"


async def test_a_request_that_the_proxy_cancels_is_counted() -> None:
    """Serve's proxy cancels the task of a request whose client has left: it counts, once, and both legs stop."""
    async with running_stack(prefill_ms_per_1k_tokens=20_000) as stack:
        engine = stack.prefill[0].engine

        def is_cancelled() -> bool:
            if not (engine.seen and engine.stats().num_requests_running):
                return False
            [task] = [task for task in asyncio.all_tasks() if served_by(task) == stack.url]
            return task.cancel()

        await leave_when(stack, "streamed completion", is_cancelled)
        await check_settled(stack)
        assert engine.aborts and stack.metric("disagg_client_disconnects_total", phase="prefill") == 1


@KINDS
@TRANSPORTS
async def test_during_prefill(kind: str, transport: Any) -> None:
    """The prefill engine is told to stop; decode never hears of the request, or stops as well."""
    async with running_stack(prefill_ms_per_1k_tokens=20_000, transport=transport) as stack:
        engine = stack.prefill[0].engine
        await leave_when(stack, kind, lambda: engine.seen and engine.stats().num_requests_running)
        await check_settled(stack)
        assert engine.aborts
        assert not outcomes(stack)
        assert transport != "nixl" or not stack.decode[0].engine.seen
        assert stack.metric("disagg_client_disconnects_total", phase="prefill") >= 1


async def test_who_leaves_is_counted_once() -> None:
    """By where its request was: several prompts are one client, and so is one whose prompt decode computes."""
    for num_prefill, phase in ((1, "prefill"), (0, "decode")):
        async with running_stack(num_prefill=num_prefill, prefill_ms_per_1k_tokens=20_000) as stack:
            engine = (stack.prefill if phase == "prefill" else stack.decode)[0].engine
            await leave_when(stack, "prompt list", lambda e=engine: e.seen and e.stats().num_requests_running)  # type: ignore[misc]
            assert stack.metric("disagg_client_disconnects_total", phase=phase) == 1
            await check_settled(stack)


@TRANSPORTS
async def test_prefill_finishes_as_the_client_leaves(transport: Any) -> None:
    """KV that is produced for a client who has left is given back when it is there."""
    async with running_stack(transport=transport) as stack:
        engine = stack.prefill[0].engine
        go_on = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> bool:
            await go_on.wait()
            return False

        engine.hook = slow
        await leave_when(stack, "completion", lambda: engine.seen and running(stack))
        await until(lambda: engine.settled)
        go_on.set()
        await until(lambda: outcomes(stack) == ["released"])
        await check_settled(stack)
        if transport != "nixl":
            assert [event["id"] for event in stack.decode[0].engine.happened("unread")] == engine.settled


def running(stack: Stack) -> bool:
    """Whether the decode engine has the request, where it gets it at once."""
    at_once = bool(stack.prefill[0].engine.kv_source)
    return not at_once or stack.decode[0].engine.stats().num_requests_running > 0


@SINGLE
@TRANSPORTS
async def test_between_the_legs(kind: str, transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the connection for the decode leg is being made: the KV is given back."""
    async with running_stack(transport=transport) as stack:
        connect = wire.Upstream._connect
        decode_url, blocked = stack.decode[0].server.url, asyncio.Event()

        async def held(self: wire.Upstream) -> Any:
            if self.url == decode_url and not blocked.is_set():
                blocked.set()
                await asyncio.Event().wait()
            return await connect(self)

        stack.client(stack.decode[0])._upstream.close()
        stack.client(stack.decode[0])._upstream._closed = False
        monkeypatch.setattr(wire.Upstream, "_connect", held)
        await leave_when(stack, kind, lambda: blocked.is_set() and stack.prefill[0].engine.happened("produced"))
        await check_settled(stack)
        assert outcomes(stack) == ["released"]
        assert len(stack.prefill[0].engine.settled) == 1
        record = stack.gateway.ledger.find(stack.prefill[0].engine.settled[0])
        assert record is not None and record.reason == "client_left"


@SINGLE
@TRANSPORTS
async def test_decode_has_not_begun(kind: str, transport: Any) -> None:
    """The decode server has the request and never gives it to its engine: it says so, and the KV is given back."""
    async with running_stack(transport=transport) as stack:
        engine = stack.decode[0].engine

        async def hang(scope: Scope, receive: Receive, send: Send) -> bool:
            while (await receive())["type"] != "http.disconnect":
                pass
            return True

        engine.hook = hang
        await leave_when(stack, kind, lambda: engine.seen and stack.prefill[0].engine.happened("produced"))
        await until(lambda: outcomes(stack) == ["released"])
        await check_settled(stack)
        assert [event["id"] for event in engine.happened("unread")] == stack.prefill[0].engine.settled
        assert engine.stats().num_handoffs_admitted_total == len(stack.gateway.membership.members("prefill"))


@SINGLE
@TRANSPORTS
async def test_decode_waits_for_room(kind: str, transport: Any) -> None:
    """Decode has admitted the hand-off and not read it: it says so, and the KV is given back."""
    async with running_stack(transport=transport, max_num_seqs=1, itl_ms=5) as stack:
        async with stack.streaming(max_tokens=1000) as other:
            assert (await other.head())[0] == 200
            await leave_when(stack, kind, lambda: stack.decode[0].engine.stats().num_requests_waiting)
            await until(lambda: outcomes(stack) == ["consumed", "released"])
            assert len(stack.decode[0].engine.happened("unread")) == 1
            other.leave()
        await check_settled(stack)


@KINDS
@TRANSPORTS
async def test_during_decode(kind: str, transport: Any) -> None:
    """Decode has read the hand-off and shown nothing: it stops, and there is nothing left to give back."""
    async with running_stack(transport=transport) as stack:
        engine = stack.decode[0].engine

        async def mute(scope: Scope, receive: Receive, send: Send) -> bool:
            held: list[Message] = []

            async def keep(message: Message) -> None:
                held.append(message)
                await asyncio.sleep(0.005)

            await engine.own_app(scope, receive, keep)
            return True

        engine.hook = mute
        await leave_when(stack, kind, lambda: engine.stats().num_requests_running and engine.seen and outcomes(stack))
        await check_settled(stack)
        assert set(outcomes(stack)) == {"consumed"}


@pytest.fixture(params=[True, False], ids=["splice", "asgi"])
async def slow_stack(request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    async with running_stack(spliced=request.param, itl_ms=5) as stack:
        yield stack


@pytest.mark.parametrize("kind", ["streamed completion", "streamed chat", "several choices"])
async def test_mid_stream(slow_stack: Stack, kind: str) -> None:
    """In the middle of the answer: the decode engine stops soon."""
    path, body = BODIES[kind]
    payload = json.dumps({"model": MODEL, "max_tokens": 1000, **body}).encode()
    async with connected(slow_stack.url) as connection:
        connection.writer.write(request_bytes("POST", path, JSON_HEADERS, payload))
        assert (await connection.head())[0] == 200
        assert all([await connection.chunk() for _ in range(5)])
        connection.leave()
    await check_settled(slow_stack)
    assert slow_stack.decode[0].engine.stats().generation_tokens_total < 500
    assert slow_stack.metric("disagg_client_disconnects_total", phase="stream") == 1
    assert slow_stack.metric("disagg_broken_streams_total") == 0
    assert slow_stack.gateway.in_flight.num == 0


@pytest.mark.parametrize(("path", "fields"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
async def test_leaving_a_route_that_is_passed_on(path: str, fields: dict[str, Any]) -> None:
    """The replica hears of it, and neither the gateway nor the replica's place goes on counting the request."""
    async with running_stack() as stack:
        reached, left = asyncio.Event(), asyncio.Event()

        async def wait(scope: Scope, receive: Receive, send: Send) -> bool:
            reached.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            return True

        stack.decode[0].engine.hook = wait
        async with connected(stack.url) as connection:
            payload = json.dumps({"model": MODEL, **fields}).encode()
            connection.writer.write(request_bytes("POST", path, JSON_HEADERS, payload))
            await asyncio.wait_for(reached.wait(), 5)
            connection.leave()
            await until(lambda: stack.gateway.in_flight.num == 0)
        await asyncio.wait_for(left.wait(), 5)
        assert stack.metric("disagg_client_disconnects_total", phase="decode") == 1
        assert stack.gateway.bodies.num_bytes == 0
        await check_settled(stack)


async def test_leaving_while_the_body_is_sent() -> None:
    """Half a request is no request."""
    async with running_stack() as stack:
        async with connected(stack.url) as connection:
            connection.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
            await connection.writer.drain()
            await asyncio.sleep(0.02)
            connection.leave()
        await until(lambda: stack.metric("disagg_client_disconnects_total", phase="body") == 1)
        await check_settled(stack)


@TRANSPORTS
async def test_many_leave_at_once(transport: Any) -> None:
    """Forty clients over 2 x 2 that leave at any moment leave nothing behind."""
    timing = {"itl_ms": 1, "prefill_ms_per_1k_tokens": 50}
    async with running_stack(num_prefill=2, num_decode=2, transport=transport, lease_s=2, **timing) as stack:

        async def one(i: int) -> None:
            path, body = list(BODIES.values())[i % len(BODIES)]
            payload = json.dumps({"model": MODEL, "max_tokens": 300, **body}).encode()
            async with connected(stack.url) as connection:
                connection.writer.write(request_bytes("POST", path, JSON_HEADERS, payload))
                await asyncio.sleep(0.004 * i)
                connection.leave()

        await asyncio.gather(*(one(i) for i in range(40)))
        await until(lambda: stack.gateway.in_flight.num == 0)
        await check_settled(stack)
