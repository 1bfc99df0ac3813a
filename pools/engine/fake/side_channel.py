# SPDX-License-Identifier: Apache-2.0
"""The port on which fake decode engines read a fake prefill engine's hand-offs, and both ends of it.

One JSON line each way over TCP. It stands for NIXL's handshake, READ and notification, and for Mooncake's bootstrap
server, request and write; for the latter it also answers `GET /query`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Any
from urllib.parse import urlsplit

from pools.engine.base import KVTransferParams
from pools.engine.fake.kv import FakeKV, Held
from transport.handoff_params import DO_REMOTE_PREFILL

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
"""As NIXL's handshake."""


class SideChannel:
    """The prefill engine's end."""

    def __init__(self, kv: FakeKV, *, engine_id: str, host: str, port: int) -> None:
        self._kv = kv
        self._engine_id = engine_id
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.host = host
        self.port = port
        """If 0 was given, the port that the kernel chose, valid after `start`."""

    async def start(self) -> None:
        """Listen. Raises OSError when the address cannot be bound."""
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and break every connection, as a process does that ends."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            line = await asyncio.wait_for(reader.readline(), _TIMEOUT_S)
            if line.startswith(b"GET "):
                writer.write(await self._http(line, reader))
            else:
                writer.write(json.dumps(await self._answer(json.loads(line), reader)).encode() + b"\n")
            await writer.drain()
        except (OSError, ValueError, TimeoutError) as exc:
            logger.warning("side channel: %s", exc)
        except asyncio.CancelledError:
            # The engine stops; a task of the server may end here.
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _http(self, line: bytes, reader: asyncio.StreamReader) -> bytes:
        """Mooncake's bootstrap server.

        Source: vLLM 0.32 `MooncakeBootstrapServer`, `GET /query`: data-parallel rank to engine.
        """
        while (await asyncio.wait_for(reader.readline(), _TIMEOUT_S)).strip():
            pass
        known = line.split()[1:2] == [b"/query"]
        body = json.dumps({"0": {"engine_id": self._engine_id, "worker_addr": {}}} if known else {}).encode()
        status = b"200 OK" if known else b"404 Not Found"
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        return head % (status, len(body)) + body

    async def _answer(self, request: Any, reader: asyncio.StreamReader) -> dict[str, Any]:
        if not isinstance(request, dict) or request.get("engine_id") != self._engine_id:
            return {"found": False}
        key = str(request.get("key"))
        held = await self._taken(key, reader) if request.get("wait") else self._kv.read(key)
        if held is None:
            return {"found": False}
        return {"found": True, "prompt_state": held.prompt_state, "num_tokens": len(held.token_ids)}

    async def _taken(self, key: str, reader: asyncio.StreamReader) -> Held | None:
        """Wait for the hand-off that a decode engine asks for; None when that engine closes the connection first."""
        taking = asyncio.ensure_future(self._kv.take(key))
        leaving = asyncio.ensure_future(reader.read())
        try:
            await asyncio.wait({taking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return taking.result() if taking.done() else None
        finally:
            taking.cancel()
            leaving.cancel()


def named(params: KVTransferParams | None) -> tuple[str, str] | None:
    """(engine id, request or transfer id) that a decode leg's parameters name; None when they name none."""
    if not params or not params.get(DO_REMOTE_PREFILL):
        return None
    engine_id = params.get("remote_engine_id")
    name = params.get("transfer_id") or params.get("remote_request_id")
    if not isinstance(engine_id, str) or not isinstance(name, str):
        return None
    return engine_id, name


async def read_handoff(params: KVTransferParams, *, lease_s: float) -> dict[str, Any] | None:
    """Read a hand-off from its prefill engine. Returns its record, or None when it is over, unknown or out of reach.

    A hand-off whose parameters name blocks has been produced, so the prefill engine answers at once. For any other one
    the prefill engine waits, up to `lease_s`.
    """
    name = named(params)
    if name is None:
        return None
    wait = not params.get("remote_block_ids")
    host, port = params.get("remote_host"), params.get("remote_port")
    if (bootstrap := params.get("remote_bootstrap_addr")) is not None:
        address = urlsplit(str(bootstrap))
        host, port = address.hostname, address.port
    try:
        async with asyncio.timeout(lease_s if wait else _TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(json.dumps({"engine_id": name[0], "key": name[1], "wait": wait}).encode() + b"\n")
                reply = json.loads(await reader.readline())
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, ValueError, TypeError, TimeoutError) as exc:
        logger.warning("hand-off %s: prefill engine did not answer: %r", name[1], exc)
        return None
    return reply if isinstance(reply, dict) and reply.get("found") else None
