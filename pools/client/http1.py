# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 from the gateway to the engines' private ports, at asyncio-protocol level.

The gateway passes a stream's bytes from socket to socket without a task switch for each token. A general HTTP client
cannot do that. This client understands only what an engine sends: no redirects, no TLS, no compression. It retries
nothing: the caller decides what to do about a lost connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import cast
from urllib.parse import urlsplit

import httptools

from pools.client.patience import Patient
from pools.client.routes import ENGINE_KEY_HEADER
from pools.errors import ReplicaLostError
from pools.process.descriptors import OWN_ERRORS

_HIGH_WATER_BYTES = 256 * 1024
_IDLE_CONNECTION_S = 60.0
"""Shorter than the engine's keep-alive, so that the engine never closes a pooled connection under a request."""

Chunk = bytes


class Exchange:
    """One request and its response. The caller takes the response with `read`, `next_chunk` or `forward`."""

    def __init__(self, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self._url = url
        self._loop = loop
        self._connection: _Connection | None = None
        self._chunks: deque[Chunk] = deque()
        self._num_buffered = 0
        self._wakeup: asyncio.Future[None] | None = None
        self._forward: Callable[[Chunk], None] | None = None
        self._error: ReplicaLostError | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.has_head = False
        self.has_body = False
        self.complete = False
        self.started_at = loop.time()
        self.last_data_at = self.started_at
        self.paused_at: float | None = None

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def over(self) -> bool:
        """Whether nothing more can come: the response is complete or has failed, or the caller has given it up."""
        return self.complete or self._error is not None or self._connection is None

    async def head(self) -> int:
        """The status, once the response's head is here. Raises ReplicaLostError."""
        while not self.has_head:
            await self._wait()
        return self.status

    async def next_chunk(self) -> Chunk | None:
        """Wait for bytes of the body and return all that are here, joined; None at the end. Raises ReplicaLostError."""
        while not self._chunks:
            if self.complete:
                return None
            await self._wait()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._num_buffered = 0
        self.resume()
        return data

    async def read(self) -> bytes:
        """The whole body. Raises ReplicaLostError when it breaks off."""
        parts: list[bytes] = []
        while (chunk := await self.next_chunk()) is not None:
            parts.append(chunk)
        return b"".join(parts)

    async def forward(self, sink: Callable[[Chunk], None], *, is_full: Callable[[], bool] = lambda: False) -> None:
        """Give every further chunk to `sink`, in the call that received it; return at the end of the body.

        Raises ReplicaLostError. `sink` must not block: its owner calls `pause` when the sink is full, and `resume` when
        there is room again. `forward` asks `is_full` once, after the buffered chunks, and pauses if the sink is full.
        """
        self.resume()
        while self._chunks:
            sink(self._chunks.popleft())
        self._num_buffered = 0
        self._forward = sink
        if is_full():
            self.pause()
        try:
            while not self.complete:
                await self._wait()
        finally:
            self._forward = None

    def pause(self) -> None:
        """Stop reading from the engine until `resume`."""
        if self.paused_at is None and self._connection is not None:
            self.paused_at = self._loop.time()
            self._connection.pause_reading()

    def resume(self) -> None:
        if self.paused_at is not None and self._connection is not None:
            self.paused_at = None
            self.last_data_at = self._loop.time()
            self._connection.resume_reading()

    def close(self) -> None:
        """Give the response up. If it is unfinished, its connection closes, which stops the request in the engine."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    def fail(self, error: ReplicaLostError) -> None:
        if not self.complete and self._error is None:
            self._error = error
            self._notify()
            self.close()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._wakeup = self._loop.create_future()
        try:
            await self._wakeup
        finally:
            self._wakeup = None
        if self._error is not None and not self._chunks:
            raise self._error

    def _notify(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    # Called by the connection.

    def _attach(self, connection: _Connection) -> None:
        self._connection = connection

    def _on_head(self, status: int) -> None:
        self.status = status
        self.has_head = True
        self.last_data_at = self._loop.time()
        self._notify()

    def _on_body(self, data: Chunk) -> None:
        self.last_data_at = self._loop.time()
        self.has_body = True
        if self._forward is not None:
            self._forward(data)
            return
        self._chunks.append(data)
        self._num_buffered += len(data)
        if self._num_buffered > _HIGH_WATER_BYTES:
            self.pause()
        self._notify()

    def _on_end(self) -> None:
        self._connection = None
        self.complete = True
        self._notify()


class _Connection(asyncio.Protocol):
    """One keep-alive connection to an engine; carries one exchange at a time."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self.idle_since = 0.0

    def send(self, exchange: Exchange, data: bytes) -> None:
        assert self._transport is not None and self._exchange is None
        self._exchange = exchange
        exchange._attach(self)
        self._transport.write(data)

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def pause_reading(self) -> None:
        if self.usable:
            assert self._transport is not None
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self.usable:
            assert self._transport is not None
            self._transport.resume_reading()

    def abandon(self) -> None:
        """Close now; a response that was still coming is not waited for."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio.Transport by class, only by interface.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._lose(f"broke the HTTP protocol: {exc}", gone=False)
            self.abandon()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._upstream._forget(self)
        self._lose("closed the connection" if exc is None else f"lost the connection: {exc}", gone=True)

    def _lose(self, what: str, *, gone: bool) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange._connection = None
            exchange.fail(ReplicaLostError(f"the engine at {self._upstream.url} {what}", sent=True, gone=gone))

    # httptools

    def on_message_begin(self) -> None:
        if self._exchange is not None:
            self._exchange.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is not None:
            self._exchange.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange._on_head(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._exchange._on_body(body)

    def on_message_complete(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        exchange._on_end()
        if self._parser.should_keep_alive() and self.usable:
            self.resume_reading()
            self._upstream._keep(self)
        else:
            self.abandon()


class Upstream:
    """The connections to one engine."""

    def __init__(self, url: str, *, connect_timeout_s: float, key: str | None = None) -> None:
        """`key`: the key that the engine requires with each request; None when it requires none."""
        parts = urlsplit(url)
        assert parts.hostname and parts.port, url
        self.url = url
        self._host = parts.hostname
        self._port = parts.port
        self._authority = parts.netloc.encode()
        self._fixed = b"host: %b\r\n" % self._authority
        if key is not None:
            self._fixed += b"%b: %b\r\n" % (ENGINE_KEY_HEADER.encode(), key.encode("ascii"))
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[_Connection] = []
        self._active: set[Exchange] = set()
        self._connections: set[_Connection] = set()
        self._closed = False

    async def open(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Exchange:
        """Send a request, and return the exchange that receives the response.

        Raises ReplicaLostError, with `sent` false, when the client cannot connect.
        """
        connection = self._pop_idle() or await self._connect()
        exchange = Exchange(self.url, asyncio.get_running_loop())
        lines = [b"%s %s HTTP/1.1\r\n%b" % (method.encode(), path.encode(), self._fixed)]
        for name, value in (headers or {}).items():
            lines.append(b"%s: %s\r\n" % (name.encode("latin-1"), value.encode("latin-1")))
        if body or method != "GET":
            lines.append(b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body))
        lines.append(b"\r\n")
        lines.append(body)
        self._active.add(exchange)
        connection.send(exchange, b"".join(lines))
        return exchange

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float,
        on_sent: Callable[[], None] = lambda: None,
    ) -> tuple[int, bytes]:
        """Status and whole body. Raises ReplicaLostError, also when `timeout_s` runs out.

        `on_sent` is called as soon as the request may have reached the engine.
        """
        exchange: Exchange | None = None
        try:
            async with Patient(timeout_s):
                exchange = await self.open(method, path, body, headers)
                on_sent()
                payload = await exchange.read()
                return exchange.status, payload
        except TimeoutError as exc:
            raise ReplicaLostError(
                f"{self.url}{path} did not answer within {timeout_s:g} s", sent=exchange is not None
            ) from exc
        finally:
            if exchange is not None:
                exchange.close()
                self._active.discard(exchange)

    def sweep(self, now: float, *, first_byte_timeout_s: float, idle_timeout_s: float, stall_timeout_s: float) -> None:
        """Fail exchanges that have stood still too long, and close connections nobody has used."""
        for exchange in list(self._active):
            if exchange.over:
                self._active.discard(exchange)
            elif exchange.paused_at is not None:
                if now - exchange.paused_at > stall_timeout_s:
                    exchange.fail(ReplicaLostError(f"the client took nothing for {stall_timeout_s:g} s", sent=True))
            else:
                # The head shows no progress: an engine writes it while the request may still wait in its queue.
                limit = idle_timeout_s if exchange.has_body else first_byte_timeout_s
                if now - exchange.last_data_at > limit:
                    exchange.fail(ReplicaLostError(f"the engine at {self.url} sent nothing for {limit:g} s", sent=True))
        for connection in [c for c in self._idle if now - c.idle_since > _IDLE_CONNECTION_S]:
            self._idle.remove(connection)
            connection.abandon()

    @property
    def is_idle(self) -> bool:
        """Whether no exchange is under way."""
        return all(exchange.over for exchange in self._active)

    def fail(self, error: ReplicaLostError) -> None:
        """Fail every exchange that is not over."""
        for exchange in list(self._active):
            # Each exchange gets its own error: the traceback of a shared one grows with every place that raises it.
            exchange.fail(ReplicaLostError(str(error), sent=error.sent, gone=error.gone))

    def close(self) -> None:
        """Close idle connections now and the others when their exchange ends."""
        self._closed = True
        for connection in self._idle:
            connection.abandon()
        self._idle.clear()

    def _pop_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with Patient(self._connect_timeout_s):
                _, connection = await loop.create_connection(lambda: _Connection(self), self._host, self._port)
        except (OSError, TimeoutError) as exc:
            reason = str(exc) or f"no answer within {self._connect_timeout_s:g} s"
            gone, own = isinstance(exc, ConnectionError), exc.errno in OWN_ERRORS
            raise ReplicaLostError(f"cannot connect to {self.url}: {reason}", sent=False, gone=gone, own=own) from exc
        self._connections.add(connection)
        return connection

    def _keep(self, connection: _Connection) -> None:
        if self._closed:
            connection.abandon()
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def _forget(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
