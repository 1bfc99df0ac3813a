# SPDX-License-Identifier: Apache-2.0
"""A keep-alive HTTP/1.1 connection that costs the measured machine little: an asyncio protocol, one request at a time.

It knows chunked and sized answers and splits no body: every piece goes to `on_body` with the time of its read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import cast
from urllib.parse import urlsplit

OnBody = Callable[[bytes, float], None]
"""A piece of the body, and the `time.perf_counter` of the read that brought it."""


class StaleConnectionError(Exception):
    """The server closed the connection while it was idle; nothing of an answer came, so send again on another one."""


class BrokenAnswerError(Exception):
    """The answer ended early, or is none."""


class Connection(asyncio.Protocol):
    """One connection. `send` may be called again when the last answer is whole."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._done: asyncio.Future[None] | None = None
        self._on_body: OnBody = _ignore
        self._in_body = False
        self._left: int | None = None
        self._heard = False
        self._close_after = False
        self._num_answers = 0
        self.status = 0

    @property
    def closed(self) -> bool:
        """The next request needs another connection."""
        return self._transport is None or self._transport.is_closing()

    async def send(self, request: bytes, on_body: OnBody) -> None:
        """Send one request and return when its answer is whole; the status is in `status`, whatever it is.

        Raises:
            StaleConnectionError: nothing of an answer came on a connection that had served before.
            BrokenAnswerError: for every other end; the connection is closed.
        """
        if self._transport is None:
            raise StaleConnectionError("closed")
        self._buffer.clear()
        self._in_body = self._heard = False
        self._on_body = on_body
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        self._num_answers += 1
        if self._close_after:
            self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._num_answers and not self._heard:
            self._end(StaleConnectionError(f"connection closed while idle: {exc}"))
        else:
            self._end(BrokenAnswerError(f"connection closed: {exc}"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._heard = True
        self._buffer += data
        if not self._in_body and not self._read_head():
            return
        if self._left is None:
            self._read_chunks(now)
        else:
            self._read_sized(now)

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        lines = bytes(self._buffer[:end]).lower().split(b"\r\n")
        del self._buffer[: end + 4]
        headers = {name: value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
        self._left = None
        if headers.get(b"transfer-encoding") != b"chunked":
            self._left = int(headers.get(b"content-length", b"0"))
        self.status = int(lines[0].split(b" ")[1])
        self._close_after = headers.get(b"connection") == b"close"
        self._in_body = True
        return True

    def _read_chunks(self, now: float) -> None:
        buffer = self._buffer
        while (line := buffer.find(b"\r\n")) >= 0:
            size = int(buffer[:line].split(b";")[0], 16)
            if len(buffer) < line + 4 + size:
                return
            piece = bytes(buffer[line + 2 : line + 2 + size])
            del buffer[: line + 4 + size]
            if not size:
                self._end(None)
                return
            self._on_body(piece, now)

    def _read_sized(self, now: float) -> None:
        assert self._left is not None
        if self._buffer:
            piece = bytes(self._buffer[: self._left])
            self._buffer.clear()
            self._left -= len(piece)
            self._on_body(piece, now)
        if not self._left:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class Client:
    """One caller of one server: a connection at a time, made when it is needed."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname, url
        self._host, self._port, self._netloc = parts.hostname, parts.port or 80, parts.netloc
        self._connection: Connection | None = None
        self.num_reconnects = 0
        """Requests sent again because the server had closed the idle connection."""

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
        """The bytes of a POST of JSON to this server."""
        lines = [f"POST {path} HTTP/1.1", f"host: {self._netloc}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body

    async def send(self, request: bytes, on_body: OnBody) -> int:
        """The status, when the answer is whole. Sends once more when the idle connection turns out to be closed.

        Raises BrokenAnswerError.
        """
        try:
            return await self._send(request, on_body)
        except StaleConnectionError:
            self.num_reconnects += 1
        try:
            return await self._send(request, on_body)
        except StaleConnectionError as exc:
            raise BrokenAnswerError(str(exc)) from exc

    async def _send(self, request: bytes, on_body: OnBody) -> int:
        if self._connection is None or self._connection.closed:
            loop = asyncio.get_running_loop()
            try:
                _, self._connection = await loop.create_connection(Connection, self._host, self._port)
            except OSError as exc:
                raise BrokenAnswerError(f"cannot connect: {exc}") from exc
        await self._connection.send(request, on_body)
        return self._connection.status

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def _ignore(piece: bytes, at: float) -> None: ...
