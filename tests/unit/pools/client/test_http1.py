# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 to an engine, against a server that writes exactly what each test says."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from pools.client.http1 import Exchange, Upstream
from pools.errors import ReplicaLostError
from tests.support.gateway_stack import until

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LIMITS = {"first_byte_timeout_s": 10.0, "idle_timeout_s": 5.0, "stall_timeout_s": 20.0}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class Server:
    """What a scripted server was sent, and how often it was connected to."""

    url: str
    num_connections: int = 0
    requests: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[Server]:
    """Run `script` for each request of each connection."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.split(b"\r\n") if line.startswith(b"content-length")]
                served.requests.append(head + await reader.readexactly(int(length[0].split()[1]) if length else 0))
                await script(reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    served = Server(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield served
    finally:
        server.close()


def writes(*parts: bytes, then: str = "keep") -> Script:
    """Write `parts` one by one, then keep the connection, close or abort it, or hang."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.003)
        if then == "close":
            writer.close()
        elif then == "abort":
            writer.transport.abort()
        elif then == "hang":
            await reader.read()

    return script


@asynccontextmanager
async def upstream_of(script: Script) -> AsyncIterator[tuple[Upstream, Server]]:
    async with serving(script) as served:
        upstream = Upstream(served.url, connect_timeout_s=1)
        yield upstream, served
        upstream.close()


async def test_request_line_and_headers() -> None:
    """A request holds what was given, the authority, and a length unless it is a GET without a body."""
    async with upstream_of(writes(b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n")) as (upstream, served):
        assert await upstream.request("POST", "/a", b"{}", {"x-request-id": "r"}, timeout_s=1) == (204, b"")
        assert await upstream.request("GET", "/b", timeout_s=1) == (204, b"")
        assert await upstream.request("POST", "/c", timeout_s=1) == (204, b"")
    authority = served.url.removeprefix("http://").encode()
    json_length = b"content-type: application/json\r\ncontent-length: "
    assert served.requests == [
        b"POST /a HTTP/1.1\r\nhost: " + authority + b"\r\nx-request-id: r\r\n" + json_length + b"2\r\n\r\n{}",
        b"GET /b HTTP/1.1\r\nhost: " + authority + b"\r\n\r\n",
        b"POST /c HTTP/1.1\r\nhost: " + authority + b"\r\n" + json_length + b"0\r\n\r\n",
    ]


BODIES = {
    "content-length": (b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nhello world",),
    "cut in a header": (b"HTTP/1.1 200 OK\r\ncontent-le", b"ngth: 11\r\n\r", b"\nhello", b" world"),
    "chunked": (CHUNKED + chunk(b"hello") + chunk(b" world") + b"0\r\n\r\n",),
    "cut in a chunk": (CHUNKED + b"5\r\nhe", b"llo\r", b"\n6\r\n world\r\n", b"0\r\n", b"\r\n"),
    "byte by byte": (*(bytes([b]) for b in CHUNKED[:20]), CHUNKED[20:] + chunk(b"hello world"), b"0\r\n\r\n"),
    "trailers": (CHUNKED + chunk(b"hello world") + b"0\r\nx-a: b\r\n\r\n",),
}


@pytest.mark.parametrize("parts", BODIES.values(), ids=BODIES.keys())
async def test_bodies(parts: tuple[bytes, ...]) -> None:
    """However the bytes are cut, the body is the same, and the connection is used again."""
    async with upstream_of(writes(*parts)) as (upstream, served):
        for _ in range(3):
            assert await upstream.request("POST", "/", b"{}", timeout_s=2) == (200, b"hello world")
        assert served.num_connections == 1


async def test_head_comes_before_the_body() -> None:
    """Status and headers are there while the body is still coming; header names are lower case."""
    async with upstream_of(writes(CHUNKED.replace(b"content-type", b"Content-Type"), then="hang")) as (upstream, _):
        exchange = await upstream.open("POST", "/", b"{}")
        assert await exchange.head() == 200
        assert exchange.header(b"content-type") == b"text/event-stream"
        assert exchange.header(b"nothing") is None
        assert not exchange.complete
        exchange.close()


async def test_chunks_are_joined_between_reads() -> None:
    """`next_chunk` gives what has arrived, and None at the end, again and again."""
    async with upstream_of(writes(CHUNKED + chunk(b"a") + chunk(b"b"), chunk(b"c") + b"0\r\n\r\n")) as (upstream, _):
        exchange = await upstream.open("POST", "/", b"{}")
        assert await exchange.next_chunk() == b"ab"
        assert await exchange.next_chunk() == b"c"
        assert await exchange.next_chunk() is None
        assert await exchange.next_chunk() is None
        assert exchange.complete


async def test_forward_gives_buffered_and_later_chunks() -> None:
    """A sink first gets what was waiting, then each chunk as it comes; `forward` returns at the end."""
    async with upstream_of(writes(CHUNKED + chunk(b"a") + chunk(b"b"), chunk(b"c"), b"0\r\n\r\n")) as (upstream, _):
        exchange = await upstream.open("POST", "/", b"{}")
        await exchange.head()
        got: list[bytes] = []
        await exchange.forward(got.append)
        assert got == [b"a", b"b", b"c"]


async def test_forward_of_a_finished_exchange() -> None:
    """A stream that ended before it is forwarded returns at once."""
    async with upstream_of(writes(CHUNKED + chunk(b"a") + b"0\r\n\r\n")) as (upstream, _):
        exchange = await upstream.open("POST", "/", b"{}")
        await until(lambda: exchange.complete)
        got: list[bytes] = []
        await exchange.forward(got.append)
        assert got == [b"a"]


LOST = {
    "closed before the head": writes(then="close"),
    "aborted before the head": writes(then="abort"),
    "closed in the head": writes(b"HTTP/1.1 200 OK\r\ncontent-le", then="close"),
    "closed in a body": writes(b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nhello", then="close"),
    "closed between chunks": writes(CHUNKED + chunk(b"a"), then="close"),
    "aborted between chunks": writes(CHUNKED + chunk(b"a"), then="abort"),
    "garbage": writes(b"\x00\x01 this is no HTTP\r\n\r\n", then="hang"),
    "garbage after the head": writes(CHUNKED + b"zz\r\n", then="hang"),
    "two lengths": writes(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", then="hang"),
    "body without an end": writes(b"HTTP/1.1 200 OK\r\n\r\nhello", then="close"),
}


@pytest.mark.parametrize("how", LOST)
async def test_lost_connections(how: str) -> None:
    """Whatever breaks after sending is ReplicaLostError with `sent`, and the connection is not used again.

    `gone` tells a peer that closed the connection from one that is there and talks nonsense.
    """
    async with upstream_of(LOST[how]) as (upstream, served):
        for number in (1, 2):
            with pytest.raises(ReplicaLostError) as caught:
                await upstream.request("POST", "/", b"{}", timeout_s=1)
            assert caught.value.sent is True
            assert caught.value.gone is (how not in ("garbage", "garbage after the head", "two lengths"))
            assert "did not answer" not in str(caught.value)
            assert served.num_connections == number
        assert not upstream._idle


async def test_loss_shows_after_what_had_arrived() -> None:
    """Chunks that came before the loss are still given out, then the error, every time."""
    async with upstream_of(writes(CHUNKED + chunk(b"a"), then="abort")) as (upstream, _):
        exchange = await upstream.open("POST", "/", b"{}")
        await until(lambda: exchange.over)
        assert await exchange.next_chunk() == b"a"
        for _ in range(2):
            with pytest.raises(ReplicaLostError):
                await exchange.next_chunk()


async def test_loss_while_forwarding() -> None:
    """`forward` raises when the engine goes away in the middle."""
    async with upstream_of(writes(CHUNKED + chunk(b"a"), chunk(b"b"), then="abort")) as (upstream, _):
        exchange = await upstream.open("POST", "/", b"{}")
        got: list[bytes] = []
        with pytest.raises(ReplicaLostError):
            await exchange.forward(got.append)
        assert got == [b"a", b"b"]


async def test_connection_refused() -> None:
    """Nobody listens: the request was not sent."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ReplicaLostError, match="cannot connect") as caught:
        await Upstream(url, connect_timeout_s=1).open("POST", "/", b"{}")
    assert (caught.value.sent, caught.value.gone) == (False, True)


async def test_connection_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that does not answer costs `connect_timeout_s`, and the request was not sent."""

    async def never(*args: object, **kwargs: object) -> None:
        await asyncio.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.get_running_loop(), "create_connection", never)
        with pytest.raises(ReplicaLostError, match=r"no answer within 0\.02 s") as caught:
            await Upstream("http://127.0.0.1:1", connect_timeout_s=0.02)._connect()
    assert (caught.value.sent, caught.value.gone) == (False, False)


async def test_a_loop_that_stood_still_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there in time counts, although the loop was busy until long after the limit."""
    loop = asyncio.get_running_loop()
    really = loop.create_connection

    async def busy(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)  # noqa: ASYNC251 - this is what is tested
        return await really(*args, **kwargs)

    async with upstream_of(writes(CHUNKED + chunk(b"a") + chunk(b""))) as (upstream, _):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "create_connection", busy)
            patched.setattr(upstream, "_connect_timeout_s", 0.05)
            assert (await upstream.request("GET", "/", timeout_s=0.05))[0] == 200


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EHOSTUNREACH])
async def test_what_it_lacks_itself_is_no_news_of_the_engine(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that fails for want of something here is told apart from one that fails on its way."""

    async def fails(*args: object, **kwargs: object) -> None:
        raise OSError(number, "no")

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.get_running_loop(), "create_connection", fails)
        with pytest.raises(ReplicaLostError) as caught:
            await Upstream("http://127.0.0.1:1", connect_timeout_s=1)._connect()
    is_ours = number != errno.EHOSTUNREACH
    assert (caught.value.sent, caught.value.own, caught.value.unreachable) == (False, is_ours, not is_ours)


async def test_a_client_that_is_full_from_the_start_stays_so() -> None:
    """What was buffered goes out first, and nothing more is read from the engine."""
    async with upstream_of(writes(CHUNKED + chunk(b"a"), then="hang")) as (upstream, _):
        exchange = await upstream.open("POST", "/", b"{}")
        await exchange.head()
        await until(lambda: exchange._chunks)
        got: list[bytes] = []
        forwarding = asyncio.ensure_future(exchange.forward(got.append, is_full=lambda: True))
        await until(lambda: got)
        assert exchange.paused_at is not None
        exchange.close()
        forwarding.cancel()


async def test_request_timeout_closes_the_connection() -> None:
    """An answer that does not come in time is lost, and the engine sees its caller leave."""
    left = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        left.set()

    async with upstream_of(script) as (upstream, _):
        with pytest.raises(ReplicaLostError, match="did not answer within") as caught:
            await upstream.request("POST", "/", b"{}", timeout_s=0.3)
        assert (caught.value.sent, caught.value.gone) == (True, False)
        await asyncio.wait_for(left.wait(), 1)


async def test_closing_stops_the_engine() -> None:
    """An exchange that is closed early closes its connection; a finished one keeps it."""
    left = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + chunk(b"a"))
        await reader.read()
        left.set()

    async with upstream_of(script) as (upstream, _):
        exchange = await upstream.open("POST", "/", b"{}")
        assert await exchange.next_chunk() == b"a"
        exchange.close()
        exchange.close()
        await asyncio.wait_for(left.wait(), 1)
        upstream.sweep(0.0, **LIMITS)
        assert not upstream._active and not upstream._idle


async def test_connection_close_is_honoured() -> None:
    """A connection that the server wants closed is not used again."""
    reply = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
    async with upstream_of(writes(reply)) as (upstream, served):
        for number in (1, 2):
            assert await upstream.request("POST", "/", b"{}", timeout_s=1) == (200, b"ok")
            assert served.num_connections == number


async def test_idle_connection_that_was_closed_is_not_used() -> None:
    """A server that closed its side in the meantime costs no request."""
    async with upstream_of(writes(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", then="close")) as (
        upstream,
        served,
    ):
        assert (await upstream.request("POST", "/", b"{}", timeout_s=1))[0] == 200
        await until(lambda: not upstream._connections)
        assert (await upstream.request("POST", "/", b"{}", timeout_s=1))[0] == 200
        assert served.num_connections == 2


async def test_concurrent_requests_have_connections_of_their_own() -> None:
    """Two requests at once take two connections; afterwards both are used again."""
    async with upstream_of(writes(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", b"ok")) as (upstream, served):
        for _ in range(3):
            replies = await asyncio.gather(*(upstream.request("POST", "/", b"{}", timeout_s=1) for _ in range(2)))
            assert replies == [(200, b"ok")] * 2
        assert served.num_connections == 2


async def test_slow_reader_stops_the_engine() -> None:
    """Beyond the high-water mark the socket is not read, and the engine's writes block until somebody reads."""
    block, num_sent = chunk(b"x" * 65_536), 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_sent
        writer.write(CHUNKED)
        for _ in range(400):
            writer.write(block)
            await writer.drain()
            num_sent += 1
        writer.write(b"0\r\n\r\n")

    async with upstream_of(script) as (upstream, _):
        exchange = await upstream.open("POST", "/", b"{}")
        await until(lambda: exchange.paused_at is not None)
        await asyncio.sleep(0.05)
        assert num_sent < 400
        assert len(await exchange.read()) == 400 * 65_536


async def test_pause_and_resume_while_forwarding() -> None:
    """A paused exchange gives its sink nothing more until it is resumed."""
    block = chunk(b"x" * 65_536)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        for _ in range(100):
            writer.write(block)
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async with upstream_of(script) as (upstream, _):
        exchange = await upstream.open("POST", "/", b"{}")
        size = 0

        def sink(data: bytes) -> None:
            nonlocal size
            size += len(data)
            if size > 100_000 and not resumed:
                exchange.pause()

        resumed = False
        forwarding = asyncio.create_task(exchange.forward(sink))
        await until(lambda: exchange.paused_at is not None)
        await asyncio.sleep(0.02)
        assert size < 1_000_000 and not forwarding.done()
        resumed = True
        exchange.resume()
        await forwarding
        assert size == 100 * 65_536


async def test_sweep_fails_what_stands_still() -> None:
    """Silence before the head, silence in a stream, and a client that takes nothing have limits of their own."""
    async with upstream_of(writes(then="hang")) as (upstream, _):
        silent = await upstream.open("POST", "/", b"{}")
        upstream.sweep(silent.started_at + 9, **LIMITS)
        assert not silent.over
        upstream.sweep(silent.started_at + 11, **LIMITS)
        with pytest.raises(ReplicaLostError, match="sent nothing for 10 s") as caught:
            await silent.head()
        assert not caught.value.gone
    async with upstream_of(writes(CHUNKED, then="hang")) as (upstream, _):
        # vLLM writes the head of a stream when it takes the request, and the first token when its turn comes.
        queued = await upstream.open("POST", "/", b"{}")
        await queued.head()
        upstream.sweep(queued.last_data_at + 9, **LIMITS)
        assert not queued.over
        upstream.sweep(queued.last_data_at + 11, **LIMITS)
        with pytest.raises(ReplicaLostError, match="sent nothing for 10 s"):
            await queued.next_chunk()
    async with upstream_of(writes(CHUNKED + chunk(b"a"), then="hang")) as (upstream, _):
        begun = await upstream.open("POST", "/", b"{}")
        assert await begun.next_chunk() == b"a"
        upstream.sweep(begun.last_data_at + 4, **LIMITS)
        assert not begun.over
        upstream.sweep(begun.last_data_at + 6, **LIMITS)
        with pytest.raises(ReplicaLostError, match="sent nothing for 5 s"):
            await begun.next_chunk()
        stalled = await upstream.open("POST", "/", b"{}")
        assert await stalled.next_chunk() == b"a"
        stalled.pause()
        upstream.sweep(stalled.last_data_at + 19, **LIMITS)
        assert not stalled.over
        upstream.sweep(stalled.last_data_at + 21, **LIMITS)
        with pytest.raises(ReplicaLostError, match="client took nothing for 20 s"):
            await stalled.next_chunk()
        assert not upstream._idle


async def test_sweep_closes_unused_connections() -> None:
    """A connection nobody used for a while is closed before the engine would close it."""
    async with upstream_of(writes(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")) as (upstream, served):
        await upstream.request("POST", "/", b"{}", timeout_s=1)
        [connection] = upstream._idle
        upstream.sweep(connection.idle_since + 59, **LIMITS)
        assert upstream._idle == [connection]
        upstream.sweep(connection.idle_since + 61, **LIMITS)
        assert not upstream._idle
        await until(lambda: not upstream._connections)
        assert await upstream.request("POST", "/", b"{}", timeout_s=1) == (200, b"ok")
        assert served.num_connections == 2


async def test_a_closed_upstream_finishes_what_runs() -> None:
    """An engine that left the pool loses its idle connections at once, running ones at their end."""
    async with upstream_of(writes(CHUNKED + chunk(b"a"), chunk(b"b") + b"0\r\n\r\n")) as (upstream, _):
        await upstream.request("POST", "/", b"{}", timeout_s=1)
        running = await upstream.open("POST", "/", b"{}")
        upstream.close()
        assert not upstream._idle
        assert await running.read() == b"ab"
        assert not upstream._idle
        await until(lambda: not upstream._connections)


async def test_unasked_response_is_ignored() -> None:
    """Bytes on an idle connection reach no later request."""
    reply = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    async with upstream_of(writes(reply + reply.replace(b"ok", b"no"))) as (upstream, _):
        assert await upstream.request("POST", "/", b"{}", timeout_s=1) == (200, b"ok")
        await asyncio.sleep(0.01)
        assert await upstream.request("POST", "/", b"{}", timeout_s=1) == (200, b"ok")


def test_an_exchange_without_connection_can_be_paused_and_closed() -> None:
    """Late calls to an exchange that is over do nothing."""
    loop = asyncio.new_event_loop()
    try:
        exchange = Exchange("http://x:1", loop)
        exchange.pause()
        exchange.resume()
        exchange.close()
        assert exchange.paused_at is None
        assert json.dumps(exchange.status) == "0"
    finally:
        loop.close()
