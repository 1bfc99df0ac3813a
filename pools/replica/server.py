# SPDX-License-Identifier: Apache-2.0
"""Serves one engine on a private port: its own OpenAI app, and `/disagg/v1` beside it.

The kernel chooses the port. Requests in flight are counted here, because Serve does not see them and a drain
has to wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
import uvicorn

from pools.borrowed import BORROWED
from pools.client import routes
from pools.client.messages import (
    Abort,
    Aborted,
    Error,
    ErrorAnswer,
    Events,
    PrefixCacheReset,
    Probe,
    Probed,
    ReplicaHealth,
    ReplicaStats,
    Settle,
    Settled,
)
from pools.engine.base import Engine, Message, Receive, Role, Scope, Send
from pools.engine.events import Batch
from pools.errors import EngineDeadError, HandoffRefusedError
from pools.health.health import EngineHealth
from pools.replica.engine_key import EngineKey
from pools.replica.readers import Readers
from transport.bounded_http import HttpLimits, bounded_protocol, closed_by
from transport.upstream.guard import require

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_BODY_BYTES = 64 * 2**20
_MAX_WAIT_S = 30.0
"""Longest wait of one read of events."""
_DRAIN_LOOK_S = 0.05
_DRAIN_WAIT_S = 0.2
_KEEP_ALIVE_S = 120
"""Longer than the gateway keeps an idle connection, so that the server is never the one who closes it first."""


def unwatched() -> EngineHealth:
    """The health of an engine that no watchdog looks at."""
    return EngineHealth()


class OpenRequests:
    """Requests that reached the engine's OpenAI app and are not finished. Belongs to one event loop."""

    def __init__(self) -> None:
        self.num = 0
        self.idle = asyncio.Event()
        """Set while there are none."""
        self.idle.set()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Count one until the block ends."""
        self.num += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.num -= 1
            if self.num == 0:
                self.idle.set()


class EngineServer:
    """One engine behind one listening socket. Start it in the loop that runs the engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        role: Role,
        host: str,
        incarnation: str,
        health: Callable[[], EngineHealth],
        requests: OpenRequests,
        limits: HttpLimits | None = None,
        key: str | None = None,
    ) -> None:
        """Listens to nothing yet.

        Args:
            health: what the replica's watchdog knows of the engine.
            requests: the server counts its requests here.
            key: what every request but `GET /health` and `GET /metrics` has to bring; None admits everyone.
        """
        self._engine = engine
        self._role = role
        self._host = host
        self._incarnation = incarnation
        self._key = EngineKey(key)
        self._started_at = time.monotonic()
        self._health = health
        self._requests = requests
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._polls: set[asyncio.Future[Batch]] = set()
        self._readers = Readers()
        self._draining = False
        self._stopping = False
        self._protocol = bounded_protocol(
            f"the {role} engine's private port", limits, admits=lambda scope: self._key.is_with(scope["headers"])
        )
        self.url = ""

    @property
    def num_in_flight(self) -> int:
        """Requests that reached the OpenAI app and are not finished."""
        return self._requests.num

    async def start(self) -> str:
        """Listen; returns the base URL.

        Raises UpstreamChangedError when uvicorn's protocol is not as `transport.bounded_http` needs it.
        """
        require(BORROWED, "transport.bounded_http")
        sock = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self._host, 0))
        config = uvicorn.Config(
            self,
            log_level="warning",
            log_config=None,  # the default closes every log handler of the process
            access_log=False,
            lifespan="auto",
            http=self._protocol,
            ws="none",
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
        """Wait until no request is in flight and no gateway may send another one, at most `timeout_s`.

        Returns False when requests are still in flight then. A gateway says that it is done when it reads events,
        so all waiting reads are answered now, and the gateways read again.
        """
        self._draining = True
        self._wake_polls()
        deadline = time.monotonic() + timeout_s
        while self._requests.num or self._readers.may_send():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return not self._requests.num
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._requests.idle.wait(), left_s)
            if not self._requests.num:
                await asyncio.sleep(min(left_s, _DRAIN_LOOK_S))
        return True

    async def told(self, timeout_s: float) -> bool:
        """Wait until every live gateway has taken the last event, so that no ledger misses how a hold ended.

        Returns False when some gateway has not taken it after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while self._readers.behind(self._engine.events.newest):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_DRAIN_LOOK_S)
        return True

    def _wake_polls(self) -> None:
        for poll in self._polls:
            poll.cancel()

    async def stop(self) -> None:
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        self._stopping = True
        self._wake_polls()
        try:
            await asyncio.wait_for(self._task, 10)
        except TimeoutError:
            logger.warning("the engine's HTTP server did not stop within 10 s; its connections are cut")
        self._server = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._key.is_with(scope["headers"]):
            # Close the connection of a caller without the key after this answer, so that it takes nobody's place.
            send = _closing(send)
        if scope["type"] == "http" and not self._key.admits(scope["method"], scope["path"], scope["headers"]):
            await _respond(send, 401, _error("missing or wrong engine key", "AuthenticationError", 401))
            return
        if scope["type"] == "http" and scope["path"].startswith(routes.CONTROL):
            await self._control(scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] == "GET":
            await self._engine.app(scope, receive, send)
            return
        with self._requests.one():
            await self._engine.app(scope, receive, send)

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        handlers: dict[tuple[str, str], Callable[[Any], Awaitable[Any]]] = {
            ("POST", routes.ABORT): self._abort,
            ("POST", routes.SETTLE): self._settle,
            ("POST", routes.PROBE): self._probe,
            ("POST", routes.RESET_PREFIX_CACHE): self._reset_prefix_cache,
            ("GET", routes.EVENTS): self._events,
            ("GET", routes.STATS): self._stats,
            ("GET", routes.HEALTH): self._tell_health,
        }
        handler = handlers.get((scope["method"], scope["path"]))
        if handler is None:
            await _respond(send, 404, _error("no such control route", "NotFoundError", 404))
            return
        try:
            given = await _read(receive) if scope["method"] == "POST" else _query(scope)
            if scope["path"] in (routes.PROBE, routes.EVENTS):
                # Both may take long, and a probe makes the engine work, so both end when the caller leaves.
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

    async def _abort(self, body: bytes) -> Aborted:
        return Aborted(await self._engine.abort(_read_abort(body).request_id))

    async def _settle(self, body: bytes) -> Settled:
        ids = _read_settle(body).handoff_ids
        if not all(ids):
            raise ValueError("handoff_ids must be a list of ids")
        if ids:
            await self._engine.settle(ids)
        return Settled(len(ids))

    async def _reset_prefix_cache(self, body: bytes) -> PrefixCacheReset:
        return PrefixCacheReset(await self._engine.reset_prefix_cache())

    async def _events(self, query: dict[str, str]) -> Events:
        """A long poll: answers at once when there is something after `after`, else when `wait_s` is over or the server
        begins to drain or stops. `reader` names the gateway; with `done` it has no more requests to send here."""
        after, wait_s = int(query.get("after", "0")), float(query.get("wait_s", "0"))
        if after < 0 or not 0 <= wait_s <= _MAX_WAIT_S:
            raise ValueError(f"after must be at least 0 and wait_s between 0 and {_MAX_WAIT_S:g}")
        reader = query.get("reader")
        if reader:
            self._readers.read(reader, after, done=query.get("done") == "1")
        if self._draining:
            # The drain waits for the gateway's next read, which may say `done`, so this read ends soon.
            wait_s = min(wait_s, _DRAIN_WAIT_S)
        if wait_s and not self._stopping:
            reading = asyncio.ensure_future(self._engine.events.read(after, wait_s))
            self._polls.add(reading)
            reading.add_done_callback(self._polls.discard)
            try:
                await asyncio.wait({reading})
            except asyncio.CancelledError:
                if reader:
                    self._readers.left(reader)
                raise
            finally:
                reading.cancel()
        batch = await self._engine.events.read(after, 0)
        return Events(self._incarnation, batch.next, batch.lost, batch.events, self._draining)

    async def _probe(self, body: bytes) -> Probed:
        asked = _read_probe(body)
        if asked.cache_salt == "":
            raise ValueError("cache_salt must be a non-empty string")
        result = await self._engine.probe(
            asked.prompt_token_ids,
            asked.kv_transfer_params,
            cache_salt=asked.cache_salt,
            priority=asked.priority,
            session_id=asked.session_id,
        )
        return Probed(
            result.num_cached_tokens, result.kv_transfer_params, result.finish_reason, result.num_cached_before
        )

    async def _tell_health(self, query: dict[str, str]) -> ReplicaHealth:
        """What this process knows of the engine, without asking it. During a drain, `ok` becomes `draining`."""
        health = self._health()
        if self._draining and health.state == "ok":
            health = replace(health, state="draining")
        return ReplicaHealth(self._incarnation, **health.as_dict())

    async def _stats(self, query: dict[str, str]) -> dict[str, Any]:
        closed = closed_by(self._protocol)
        return ReplicaStats.of(
            self._engine.stats(),
            engine_id=self._engine.engine_id,
            role=self._role,
            incarnation=self._incarnation,
            pid=os.getpid(),
            num_requests_in_flight=self._requests.num,
            connections_closed=closed,
            num_connections_closed_total=sum(closed.values()),
            uptime_s=round(time.monotonic() - self._started_at, 3),
        ).as_dict()


class _QuietServer(uvicorn.Server):
    """A uvicorn server that leaves the process's signal handlers alone."""

    def install_signal_handlers(self) -> None:  # older uvicorn
        pass

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()


def _error(message: str, kind: str, code: int) -> ErrorAnswer:
    return ErrorAnswer(Error(message, kind, code))


def _query(scope: Scope) -> dict[str, str]:
    return dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))


async def _read(receive: Receive) -> bytes:
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
            return b"".join(chunks)


class _CallerLeftError(Exception):
    """The caller closed the connection before it was answered."""


async def _while_connected(receive: Receive, work: Awaitable[T]) -> T:
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


def _closing(send: Send) -> Send:
    """Wrap `send`, so that the answer also ends the connection."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return closing


async def _respond(send: Send, status: int, body: Any) -> None:
    payload = _encode(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode())]
    start: Message = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": payload})


_encode = msgspec.json.Encoder().encode
_read_abort = msgspec.json.Decoder(Abort).decode
_read_settle = msgspec.json.Decoder(Settle).decode
_read_probe = msgspec.json.Decoder(Probe).decode
