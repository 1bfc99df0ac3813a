# SPDX-License-Identifier: Apache-2.0
"""Socket-to-socket streams, and the private names of uvicorn that they hang on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
import uvicorn.protocols.http.auto as uvicorn_auto
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from disagg.config import GatewayConfig
from disagg.gateway import app as gateway_app
from disagg.gateway.stream import splice
from disagg.gateway.stream.splice import SplicingProtocol, splice_of
from pools.engine.base import Receive, Scope, Send
from tests.support.gateway_stack import (
    JSON_HEADERS,
    MODEL,
    Hook,
    Stack,
    connected,
    request_bytes,
    respond,
    running_stack,
    until,
)

STREAM = (b"content-type", b"text/event-stream")


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app that is never called."""


def protocol_over(transport: Any) -> SplicingProtocol:
    config = uvicorn.Config(_nothing, http=SplicingProtocol, log_level="warning")
    config.load()
    protocol = SplicingProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    protocol.connection_made(transport)
    return protocol


class Transport:
    """Just enough of a transport for uvicorn's protocol."""

    def __init__(self) -> None:
        self.written = b""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        """Called for long bodies."""

    def resume_reading(self) -> None:
        """Called when the body is wanted."""

    def close(self) -> None:
        """Called at the end."""


async def test_uvicorn_still_has_what_we_use() -> None:
    """Contract: each private name of uvicorn that `splice` touches, on a protocol that has received a request."""
    protocol = protocol_over(transport := Transport())
    for name in ("on_message_begin", "pause_writing", "resume_writing", "data_received"):
        assert callable(getattr(HttpToolsProtocol, name))
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert protocol.scope["extensions"] == {"disagg.protocol": protocol}  # type: ignore[comparison-overlap]
    assert isinstance(protocol.flow, FlowControl) and protocol.flow.write_paused is False
    assert isinstance(protocol.cycle, RequestResponseCycle)
    assert protocol.transport is cast(Any, transport) and protocol.loop is asyncio.get_running_loop()
    assert (protocol.cycle.response_started, protocol.cycle.response_complete) == (False, False)
    assert protocol.cycle.chunked_encoding is None
    await protocol.cycle.send({"type": "http.response.start", "status": 200, "headers": [STREAM]})
    assert protocol.cycle.response_started and protocol.cycle.chunked_encoding is True
    assert b"transfer-encoding: chunked" in transport.written
    protocol.pause_writing()
    assert protocol.flow.write_paused is True
    protocol.resume_writing()
    assert protocol.flow.write_paused is False


def test_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `install` a server that chooses its protocol by itself speaks through ours."""
    monkeypatch.setattr(uvicorn_auto, "AutoHTTPProtocol", HttpToolsProtocol)
    splice.install()
    config = uvicorn.Config(_nothing, http="auto")
    config.load()
    assert config.http_protocol_class is SplicingProtocol


async def test_only_a_started_chunked_response_of_this_loop_is_spliced() -> None:
    """Anything unexpected falls back to ASGI."""
    protocol = protocol_over(Transport())
    scope: Scope = {"type": "http", "extensions": {"disagg.protocol": protocol}}

    def cycle(**fields: Any) -> Any:
        usual = {"response_started": True, "response_complete": False, "chunked_encoding": True}
        return SimpleNamespace(**usual | fields)

    assert splice_of(scope) is None
    protocol.cycle = cycle()
    assert splice_of(scope) is protocol
    for fields in ({"response_started": False}, {"response_complete": True}, {"chunked_encoding": False}):
        protocol.cycle = cycle(**fields)
        assert splice_of(scope) is None
    protocol.cycle = cycle(chunked_encoding=None)
    assert splice_of(scope) is None
    protocol.cycle = cycle()
    others: list[Scope] = [{}, {"extensions": None}, {"extensions": {}}, {"extensions": {"disagg.protocol": object()}}]
    for other in others:
        assert splice_of({"type": "http", **other}) is None
    protocol.loop = asyncio.new_event_loop()
    assert splice_of(scope) is None
    protocol.loop.close()


@pytest.mark.parametrize(
    ("http", "path"),
    [(SplicingProtocol, "splice"), (HttpToolsProtocol, "asgi"), (H11Protocol, "asgi")],
    ids=["splice", "httptools", "h11"],
)
async def test_both_paths_give_the_same_bytes(http: Any, path: str) -> None:
    """A stream has the same events, one a chunk, whichever way it takes; then the connection is used again."""
    async with running_stack(http=http, itl_ms=3) as stack:
        texts = []
        for endpoint in ("/v1/completions", "/v1/chat/completions"):
            async with stack.streaming(endpoint, max_tokens=20) as connection:
                reply = await connection.reply()
                assert reply.status == 200 and reply.events[-1] == "[DONE]"
                texts.append(reply.text)
                connection.writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
                assert (await connection.reply()).status == 200
        whole = [await stack.complete(max_tokens=20), await stack.chat(max_tokens=20)]
        assert texts == [reply.text for reply in whole]
        assert stack.metric("disagg_streams_total", path=path) == 2
        await stack.settled()


async def test_http_1_0_client_gets_the_whole_stream() -> None:
    """An old client gets every event and the end of the connection."""
    async with running_stack() as stack, stack.streaming() as unused:
        unused.leave()
        host, _, port = stack.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"model": "tiny", "prompt": "hi there", "stream": true, "max_tokens": 3}'
        writer.write(b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        received = await reader.read()
        assert b"200 OK" in received and received.count(b'"choices"') == 3 and b"data: [DONE]" in received
        writer.close()


def floods(num_blocks: int, sent: list[int]) -> Hook:
    """Answer with a stream of 64 KiB events; `sent` counts them."""

    async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
        await send({"type": "http.response.start", "status": 200, "headers": [STREAM]})
        for i in range(num_blocks):
            await send({"type": "http.response.body", "body": b"data: " + b"x" * 65_528 + b"\n\n", "more_body": True})
            sent.append(i)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        return True

    return hook


@pytest.mark.parametrize("spliced", [True, False], ids=["splice", "asgi"])
async def test_slow_client_pauses_the_engine(spliced: bool) -> None:
    """A client that does not read stops the engine's writes; when it reads, everything arrives."""
    async with running_stack(spliced=spliced) as stack:
        sent: list[int] = []
        stack.decode[0].engine.hook = floods(300, sent)
        async with stack.streaming() as connection:
            assert (await connection.head())[0] == 200
            await _at_rest(stack, sent)
            assert 0 < len(sent) < 300
            [exchange] = _exchanges(stack)
            assert exchange.paused_at is not None
            size = 0
            while data := await connection.chunk():
                size += len(data)
            assert size == 300 * 65_536 + len(b"data: [DONE]\n\n")


async def test_client_that_takes_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that nobody reads ends at its limit, in the engine and in the gateway."""
    monkeypatch.setattr(gateway_app, "_SWEEP_S", 0.02)
    async with running_stack(config=GatewayConfig(client_stall_timeout_s=0.1)) as stack:
        sent: list[int] = []
        stack.decode[0].engine.hook = floods(300, sent)
        async with stack.streaming() as connection:
            assert (await connection.head())[0] == 200
            await until(lambda: stack.gateway.in_flight.num == 0)
        assert stack.metric("disagg_broken_streams_total") == 1


async def test_client_that_never_read_its_last_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second request on its connection does not wait for ever behind the unread answer to the first."""
    monkeypatch.setattr(gateway_app, "_SWEEP_S", 0.02)
    async with running_stack(config=GatewayConfig(client_stall_timeout_s=0.1)) as stack:
        large = json.dumps({"choices": [], "padding": "x" * 8 * 2**20}).encode()
        stack.decode[0].engine.hook = respond(200, large)
        body = json.dumps({"model": MODEL, "prompt": "a prompt longer than one block of KV"}).encode()
        async with connected(stack.url) as connection:
            connection.reader._transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(2):
                connection.writer.write(request_bytes("POST", "/v1/completions", JSON_HEADERS, body))
            await until(lambda: len(stack.decode[0].engine.seen) == 2)
            await until(lambda: stack.gateway.in_flight.num == 0)


async def test_chunks_after_the_client_left_are_dropped() -> None:
    """The engine is not blamed when its next chunk meets a closed connection."""

    class Closed(Transport):
        def is_closing(self) -> bool:
            return True

        def write(self, data: bytes) -> None:
            raise RuntimeError("the handler is closed")

    class Chunks:
        """An exchange that gives two chunks."""

        async def forward(self, sink: Callable[[bytes], None], *, is_full: Callable[[], bool]) -> None:
            sink(b"a")
            sink(b"b")

    await protocol_over(Closed()).splice(cast(Any, Chunks()))


async def _at_rest(stack: Stack, sent: list[int]) -> None:
    """Return once the gateway has stopped reading and the engine writing; a loaded machine pauses in between, too."""
    before = -1
    while before != len(sent) or not all(exchange.paused_at is not None for exchange in _exchanges(stack)):
        before = len(sent)
        await asyncio.sleep(0.1)


def _exchanges(stack: Stack) -> list[Any]:
    active = stack.client(stack.decode[0])._upstream._active
    return [exchange for exchange in active if not exchange.over]
