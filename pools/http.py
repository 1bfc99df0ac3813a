# SPDX-License-Identifier: Apache-2.0
"""Serves one engine on a private port: its own OpenAI app, and `/disagg/v1` beside it.

The kernel chooses the port. Requests in flight are counted here, because Serve does not see them and a drain
has to wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

import uvicorn

from pools.engine.base import Engine, Message, Receive, Role, Scope, Send
from pools.engine.events import Batch
from pools.errors import EngineDeadError, HandoffRefusedError

logger = logging.getLogger(__name__)

PREFIX = "/disagg/v1/"
_MAX_BODY_BYTES = 64 * 2**20
_MAX_WAIT_S = 30.0
"""Longest wait of one read of events."""
_KEEP_ALIVE_S = 120
"""Longer than the gateway keeps an idle connection, so that the server is never the one who closes it first."""


class EngineServer:
    """One engine behind one listening socket. Start it in the loop that runs the engine."""

    def __init__(self, engine: Engine, *, role: Role, host: str, incarnation: str) -> None:
        self._engine = engine
        self._role = role
        self._host = host
        self._incarnation = incarnation
        self._started_at = time.monotonic()
        self._num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._polls: set[asyncio.Future[Batch]] = set()
        self._stopping = False
        self.url = ""

    @property
    def num_in_flight(self) -> int:
        """Requests that reached the OpenAI app and are not finished."""
        return self._num_in_flight

    async def start(self) -> str:
        """Listen; returns the base URL."""
        sock = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self._host, 0))
        config = uvicorn.Config(
            self,
            log_level="warning",
            access_log=False,
            lifespan="auto",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=5,
        )
        self._server = _QuietServer(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise RuntimeError("the engine's HTTP server ended before it started")
            await asyncio.sleep(0.01)
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{sock.getsockname()[1]}"
        return self.url

    async def drain(self, timeout_s: float) -> bool:
        """Wait until no request is in flight; False when `timeout_s` was not enough."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        self._stopping = True
        for poll in self._polls:
            poll.cancel()
        try:
            await asyncio.wait_for(self._task, 10)
        except TimeoutError:
            logger.warning("the engine's HTTP server did not stop within 10 s; its connections are cut")
        self._server = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PREFIX):
            await self._control(scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] == "GET":
            await self._engine.app(scope, receive, send)
            return
        self._num_in_flight += 1
        self._idle.clear()
        try:
            await self._engine.app(scope, receive, send)
        finally:
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._idle.set()

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        handlers: dict[tuple[str, str], Callable[[Any], Awaitable[dict[str, Any]]]] = {
            ("POST", "abort"): self._abort,
            ("POST", "settle"): self._settle,
            ("POST", "probe"): self._probe,
            ("POST", "reset_prefix_cache"): self._reset_prefix_cache,
            ("GET", "events"): self._events,
            ("GET", "stats"): self._stats,
        }
        handler = handlers.get((scope["method"], scope["path"].removeprefix(PREFIX)))
        if handler is None:
            await _respond(send, 404, _error("no such control route", "NotFoundError", 404))
            return
        try:
            given = await _read(receive) if scope["method"] == "POST" else _query(scope)
            if handler in (self._probe, self._events):
                # They may wait long, and a probe has an engine work for it.
                answer = await _while_connected(receive, handler(given))
            else:
                answer = await handler(given)
        except _CallerLeftError:
            return
        except (ValueError, KeyError, TypeError) as exc:
            await _respond(send, 400, _error(f"bad control request: {exc}", "BadRequestError", 400))
        except HandoffRefusedError as exc:
            await _respond(send, 409, _error(str(exc), "ConflictError", 409))
        except EngineDeadError as exc:
            await _respond(send, 503, _error(str(exc), "ServiceUnavailableError", 503))
        else:
            await _respond(send, 200, answer)

    async def _abort(self, body: Any) -> dict[str, Any]:
        return {"aborted": await self._engine.abort(str(body["request_id"]))}

    async def _settle(self, body: Any) -> dict[str, Any]:
        ids = body["handoff_ids"]
        if not isinstance(ids, list) or not all(isinstance(item, str) and item for item in ids):
            raise ValueError("handoff_ids must be a list of ids")
        if ids:
            await self._engine.settle(ids)
        return {"settled": len(ids)}

    async def _reset_prefix_cache(self, body: Any) -> dict[str, Any]:
        return {"reset": await self._engine.reset_prefix_cache()}

    async def _events(self, query: dict[str, str]) -> dict[str, Any]:
        """A long poll: answers at once when there is something after `after`, else when `wait_s` is over or the server
        stops."""
        after, wait_s = int(query.get("after", "0")), float(query.get("wait_s", "0"))
        if after < 0 or not 0 <= wait_s <= _MAX_WAIT_S:
            raise ValueError(f"after must be at least 0 and wait_s between 0 and {_MAX_WAIT_S:g}")
        if wait_s and not self._stopping:
            reading = asyncio.ensure_future(self._engine.events.read(after, wait_s))
            self._polls.add(reading)
            reading.add_done_callback(self._polls.discard)
            try:
                await asyncio.wait({reading})
            finally:
                reading.cancel()
        batch = await self._engine.events.read(after, 0)
        return {"incarnation": self._incarnation, "next": batch.next, "lost": batch.lost, "events": batch.events}

    async def _probe(self, body: Any) -> dict[str, Any]:
        ids = [int(token) for token in body["prompt_token_ids"]]
        result = await self._engine.probe(ids, body.get("kv_transfer_params"))
        return {
            "num_cached_tokens": result.num_cached_tokens,
            "kv_transfer_params": result.kv_transfer_params,
            "finish_reason": result.finish_reason,
        }

    async def _stats(self, query: dict[str, str]) -> dict[str, Any]:
        return {
            "engine_id": self._engine.engine_id,
            "role": self._role,
            "incarnation": self._incarnation,
            "pid": os.getpid(),
            "num_requests_in_flight": self._num_in_flight,
            "uptime_s": round(time.monotonic() - self._started_at, 3),
            **self._engine.stats().as_dict(),
        }


class _QuietServer(uvicorn.Server):
    """A uvicorn server that leaves the process's signal handlers alone."""

    def install_signal_handlers(self) -> None:  # older uvicorn
        pass

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()


def _error(message: str, kind: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _query(scope: Scope) -> dict[str, str]:
    return dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))


async def _read(receive: Receive) -> Any:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ValueError("the caller left")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > _MAX_BODY_BYTES:
            raise ValueError(f"body is over {_MAX_BODY_BYTES} bytes")
        chunks.append(chunk)
        if not message.get("more_body"):
            return json.loads(b"".join(chunks))


class _CallerLeftError(Exception):
    """The caller closed the connection before it was answered."""


async def _while_connected(receive: Receive, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`, which is cancelled when the caller leaves. Raises _CallerLeftError."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _CallerLeftError
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(send: Send, status: int, body: dict[str, Any]) -> None:
    payload = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode())]
    start: Message = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": payload})
