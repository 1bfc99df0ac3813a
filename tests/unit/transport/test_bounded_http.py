# SPDX-License-Identifier: Apache-2.0
"""What a private HTTP port does with connections that send nothing, half a request, too much, or no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from transport.bounded_http import BoundedProtocol, Door, HttpLimits, bounded_protocol

QUICK = HttpLimits(head_s=0.05, body_s=0.05, max_head_bytes=2048, max_connections=4)
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class App:
    """Reads the body and answers 200, once `may_read` and `may_answer` are set."""

    def __init__(self) -> None:
        self.may_read = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.started = asyncio.Event()
        self.bodies: list[bytes] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.may_read.set()
        self.may_answer.set()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.started.set()
        await self.may_read.wait()
        body = b""
        while (message := await receive())["type"] != "http.disconnect":
            body += message["body"]
            if not message.get("more_body"):
                break
        self.headers.append(dict(scope["headers"]))
        self.bodies.append(body)
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


class Watching:
    """Answers nobody, and counts the requests whose client it sees leave."""

    def __init__(self) -> None:
        self.num_here = 0
        self.num_left = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.num_here += 1
        while (await receive())["type"] != "http.disconnect":
            pass
        self.num_left += 1


class _Server(uvicorn.Server):
    def capture_signals(self) -> Any:
        return contextlib.nullcontext()


@asynccontextmanager
async def served(limits: HttpLimits, **options: Any) -> AsyncIterator[tuple[App, type[BoundedProtocol], int]]:
    app = App()
    async with serving(app, limits, **options) as (protocol, port):
        yield app, protocol, port


@asynccontextmanager
async def serving(app: Any, limits: HttpLimits, **options: Any) -> AsyncIterator[tuple[type[BoundedProtocol], int]]:
    protocol = bounded_protocol("test", limits, **options)
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", access_log=False, timeout_graceful_shutdown=1
    )
    server = _Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        running = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield protocol, sock.getsockname()[1]
        finally:
            server.should_exit = True
            await running
    assert not protocol.door._silent, "a connection that is gone is remembered"


@asynccontextmanager
async def talking(port: int, sent: bytes = b"") -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes the connection."""
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionResetError):
            return await reader.read()
    return b""


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "its head did not come in time"),
        (b"\r\n", "its head did not come in time"),
        (b"POST /v1/completions HT", "its head did not come in time"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf", "its body did not come in time"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab", "its body did not come in time"),
        (GET + b"GET /again HT", "its head did not come in time"),
        (b"\x00\xff" * 500, "it is not HTTP/1.1"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "it is not HTTP/1.1"),
        (b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com\r\n\r\n", "a tunnel to another server"),
        (b"GET /" + b"a" * 4000 + b" HTTP/1.1\r\n\r\n", "its head is too large"),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 4000, "its head is too large"),
    ],
)
async def test_garbage_is_closed_and_counted(sent: bytes, reason: str) -> None:
    """Each kind is closed within the limits, and counted by why; the server goes on."""
    async with served(QUICK) as (_, protocol, port):
        async with talking(port, sent) as (reader, _):
            await rest(reader)
        assert protocol.door.closed == {reason: 1}
        async with talking(port, GET) as (reader, _):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_a_large_head_is_told_so() -> None:
    """431, so that a gateway with such a head can say what is wrong."""
    async with served(QUICK) as (_, _, port), talking(port, b"GET / HTTP/1.1\r\na: " + b"b" * 4000) as (reader, _):
        assert (await rest(reader)).startswith(b"HTTP/1.1 431 ")


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
WEBSOCKET = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
LENGTH = b"Content-Length: 5\r\n\r\nhello"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


@pytest.mark.parametrize("cut", [None, 1, 40])
@pytest.mark.parametrize("body", [LENGTH, CHUNKED])
@pytest.mark.parametrize("offer", [H2C, WEBSOCKET])
async def test_an_offer_to_upgrade_is_ignored(offer: bytes, body: bytes, cut: int | None) -> None:
    """The request is answered as HTTP/1.1 with its body, whatever pieces it comes in, and so are those behind it."""
    sent = (b"POST /a HTTP/1.1\r\nHost: x\r\nA: 1\r\n" + offer + body) * 3 + GET
    size = cut or len(sent)
    async with served(HttpLimits()) as (app, protocol, port), talking(port) as (reader, writer):
        for start in range(0, len(sent), size):
            writer.write(sent[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
        for _ in range(4):
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert app.bodies == [b"hello", b"hello", b"hello", b""]
        assert all(headers[b"a"] == b"1" and b"upgrade" not in headers for headers in app.headers[:3])
        assert not protocol.door.closed


async def test_an_offer_to_upgrade_keeps_the_other_wishes() -> None:
    """A client that offers an upgrade and wants its connection closed gets it closed."""
    offer = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n"
    async with served(HttpLimits()) as (_, _, port), talking(port, offer) as (reader, _):
        assert (await rest(reader)).endswith(b"ok")


async def test_many_offers_at_once() -> None:
    """Thousands of them in one piece are answered one after the other."""
    number = 2000
    offer = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    async with served(HttpLimits()) as (_, _, port), talking(port, offer * number) as (reader, _):
        for _ in range(number):
            await reader.readuntil(b"ok")


LONG = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n" + b"x" * 100_000


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("behind", [b"", GET, GET * 3, LONG])
async def test_a_client_that_sends_ahead_and_leaves(behind: bytes, later: bool, reset: bool) -> None:
    """The request that is being answered hears of it. uvicorn would tell the newest one alone, and stops to read when
    another request comes `later`."""
    app = Watching()
    async with serving(app, HttpLimits()) as (_, port), asyncio.timeout(5):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(GET if later else GET + behind)
        while not app.num_here:
            await asyncio.sleep(0.01)
        if later:
            sock.sendall(behind)
            await asyncio.sleep(0.05)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        while not app.num_left:
            await asyncio.sleep(0.01)
        assert app.num_here == 1


async def test_requests_that_take_long_are_left_alone() -> None:
    """Neither an answer that takes long, nor a body that the application does not read yet, nor a connection between
    two requests runs into the limits of requests that do not come."""
    async with served(QUICK) as (app, protocol, port):
        app.may_read.clear()
        app.may_answer.clear()
        size = 2**21
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size
        async with talking(port, head + b"x" * size) as (reader, writer):
            await app.started.wait()
            await asyncio.sleep(4 * QUICK.body_s + 0.4)
            app.may_read.set()
            await asyncio.sleep(4 * QUICK.body_s + 0.4)
            app.may_answer.set()
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(4 * QUICK.head_s + 0.4)
            writer.write(GET)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert not protocol.door.closed


async def test_a_busy_process_reads_before_it_closes() -> None:
    """A loop that was blocked beyond the limit finds the request that came meanwhile."""
    async with served(QUICK) as (_, protocol, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            await asyncio.sleep(0.02)
            client.sendall(GET)
            blocked = asyncio.get_running_loop().time() + 3 * QUICK.head_s
            while asyncio.get_running_loop().time() < blocked:
                pass
            client.setblocking(False)
            async with asyncio.timeout(2):
                assert (await asyncio.get_running_loop().sock_recv(client, 99)).startswith(b"HTTP/1.1 200")
        assert not protocol.door.closed


async def test_silent_connections_keep_nobody_out() -> None:
    """Beyond the bound the oldest silent connection goes; those with a request stay, and a new one gets in."""
    async with served(HttpLimits(max_connections=4)) as (app, protocol, port):
        app.may_answer.clear()
        async with contextlib.AsyncExitStack() as stack:
            at_work, _ = await stack.enter_async_context(talking(port, GET))
            await app.started.wait()
            for _ in range(12):
                await stack.enter_async_context(talking(port))
            app.may_answer.set()
            new, _ = await stack.enter_async_context(talking(port, GET))
            for reader in (at_work, new):
                assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            assert protocol.door.closed["too many connections"] >= 9


async def test_requests_of_nobody_keep_nobody_out() -> None:
    """Connections that sent a whole request without what admits them count as silent, also the second time."""
    admits = {"admits": lambda scope: (b"key", b"1") in scope["headers"]}
    async with (
        served(HttpLimits(max_connections=4), **admits) as (_, protocol, port),
        contextlib.AsyncExitStack() as stack,
    ):
        keyed = GET[:-2] + b"key: 1\r\n\r\n"
        at_work, writer = await stack.enter_async_context(talking(port, keyed))
        await at_work.readuntil(b"ok")
        for _ in range(12):
            reader, again = await stack.enter_async_context(talking(port, GET))
            await reader.readuntil(b"ok")
            again.write(GET)
            await reader.readuntil(b"ok")
        new, _ = await stack.enter_async_context(talking(port, keyed))
        writer.write(keyed)
        for reader in (at_work, new):
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert protocol.door.closed["too many connections"] >= 9


async def test_garbage_behind_a_request_does_not_get_into_its_answer() -> None:
    """What follows a request on its connection and is no HTTP ends the connection, without a second answer."""
    async with served(QUICK) as (app, _, port):
        app.may_answer.clear()
        async with talking(port, GET) as (reader, writer):
            await app.started.wait()
            writer.write(b"\x00\x01\x02\r\n\r\n")
            assert await rest(reader) == b""


def test_connections_follow_the_limit_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class is made when its module is imported, before the process has raised its limit."""
    door = Door("d", HttpLimits(max_connections=4096))
    for soft, most in ((1024, 512), (65_535, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert door.max_connections == most
