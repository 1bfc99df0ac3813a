# SPDX-License-Identifier: Apache-2.0
"""A bare HTTP/1.1 client for the engine contract: shows the frames of a chunked body as they were written.

One request a connection, no redirects, no TLS. Not a client for production traffic.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class HttpReply:
    """Status, lower-case headers and whole body of one answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class OpenReply:
    """An answer whose body is still coming."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader

    async def frames(self) -> AsyncIterator[bytes]:
        """Body as the server wrote it: one item a chunk, or one item when it is not chunked."""
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            length = self.headers.get("content-length")
            yield await (self._reader.readexactly(int(length)) if length else self._reader.read())
            return
        while size := int((await self._reader.readline()).split(b";")[0], 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readline()


@contextlib.asynccontextmanager
async def open_request(
    method: str, url: str, body: Any = None, *, headers: dict[str, str] | None = None
) -> AsyncIterator[OpenReply]:
    """Send one request; leaving the context closes the connection, whatever is still to come.

    `body` is sent as JSON, bytes as they are. Raises OSError when the server cannot be reached.
    """
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [f"{method} {path} HTTP/1.1", f"host: {parts.netloc}", "connection: close"]
        lines += [f"content-length: {len(payload)}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + payload)
        status = int((await reader.readline()).split()[1])
        received: dict[str, str] = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            received[name.lower()] = value.strip()
        yield OpenReply(status, received, reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def request(
    method: str, url: str, body: Any = None, *, headers: dict[str, str] | None = None, timeout_s: float = 60.0
) -> HttpReply:
    """Send one request and read the whole answer. Raises TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s), open_request(method, url, body, headers=headers) as reply:
        return HttpReply(reply.status, reply.headers, b"".join([frame async for frame in reply.frames()]))
