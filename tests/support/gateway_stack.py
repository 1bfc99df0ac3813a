# SPDX-License-Identifier: Apache-2.0
"""A whole gateway over fake engines in one event loop: real sockets, no Ray, no vLLM.

`Gateway` and `create_app` run under uvicorn as in production; each engine is a `FakeEngine` behind `EngineServer`.
Membership is fed by hand, so that a test decides what joins, leaves and restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, get_args

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from disagg.config import GatewayConfig
from disagg.gateway.app import Gateway, create_app
from disagg.gateway.front.fields import Endpoint
from disagg.gateway.front.openapi import Body
from disagg.gateway.replicas.membership import DECODE, POOLS, PREFILL
from disagg.gateway.serve_plan import NOTHING_KNOWN, PoolPlan
from disagg.gateway.stream.splice import SplicingProtocol
from disagg.routing.views import ReplicaInfo
from pools.client.replica import ReplicaClient
from pools.config import FakeEngineConfig
from pools.engine.base import ASGIApp, KVTransferParams, Message, ProbeResult, Receive, Role, Scope, Send
from pools.engine.fake import openai_shapes as fake_wire
from pools.engine.fake.engine import FakeEngine
from pools.engine.fake.text import NUM_WORDS, WORD_BASE, word
from pools.engine.fake.tiers import FakeSharedCache
from pools.health.health import EngineHealth
from pools.replica.server import EngineServer, OpenRequests, unwatched
from transport.config import MooncakeConfig, NixlConfig
from transport.descriptor import Transport
from transport.errors import DisaggError
from transport.handoff_params import is_warm_up
from transport.transports import describe

MODEL = "tiny"
MAX_MODEL_LEN = 2048
TRANSPORTS: dict[str, Transport] = {
    "nixl": describe(NixlConfig()),
    "nixl-push": describe(NixlConfig(mode="push")),
    "mooncake": describe(MooncakeConfig(type="mooncake")),
}
FAST = {"itl_ms": 0, "prefill_ms_per_1k_tokens": 0, "transfer_ms_per_1k_tokens": 0, "max_model_len": MAX_MODEL_LEN}

T = TypeVar("T")
Hook = Callable[[Scope, Receive, Send], Awaitable[bool]]
"""Runs before the engine's own app; True when it has answered."""

_numbers = itertools.count(1)


def run(coroutine: Awaitable[T], *, plain_loop: bool = False) -> T:
    """Run a test's coroutine, under uvloop when it is installed."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if not plain_loop:
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop

    async def limited() -> T:
        async with asyncio.timeout(20):
            return await coroutine

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(limited())


async def until(condition: Callable[[], Any], *, timeout_s: float = 5.0) -> None:
    """Return once `condition` holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@dataclass(frozen=True)
class Seen:
    """One request that reached an engine's OpenAI app."""

    path: str
    headers: dict[str, str]
    body: Any


def respond(status: int, body: bytes = b'{"error": {"message": "x", "code": 1}}') -> Hook:
    """Answer every completion so."""

    async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
        if "completions" not in scope["path"]:
            return False
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return True

    return hook


class WatchedEngine(FakeEngine):
    """A fake engine that remembers what it was asked, and fails on request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Seen] = []
        self.aborts: list[str] = []
        self.settled: list[str] = []
        self.probes: list[list[int]] = []
        self.probe_salts: list[str | None] = []
        self.probe_fields: list[dict[str, Any]] = []
        self.hook: Hook | None = None

    @property
    def own_app(self) -> ASGIApp:
        """The engine behind its HTTP server: where requests are taken and answered."""
        return super()._serve

    async def abort(self, request_id: str) -> bool:
        self.aborts.append(request_id)
        return await super().abort(request_id)

    async def settle(self, handoff_ids: Sequence[str]) -> None:
        self.settled += handoff_ids
        await super().settle(handoff_ids)

    def happened(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind so far, but for warm-ups."""
        events = self.events._events
        return [e for e in events if e["kind"] == kind and not is_warm_up(str(e.get("id")))]

    @property
    def outcomes(self) -> list[str]:
        """How each hand-off ended."""
        return [event["outcome"] for event in self.happened("ended")]

    async def probe(
        self,
        prompt_token_ids: Sequence[int],
        kv_transfer_params: KVTransferParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        session_id: str | None = None,
    ) -> ProbeResult:
        self.probes.append(list(prompt_token_ids))
        self.probe_salts.append(cache_salt)
        self.probe_fields.append({"priority": priority, "session_id": session_id})
        return await super().probe(prompt_token_ids, kv_transfer_params, cache_salt=cache_salt)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            receive = await self._note(scope, receive)
            if self.hook is not None and await self.hook(scope, receive, send):
                return
        await self.own_app(scope, receive, send)

    async def _note(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, remember the request, and give the body to whoever asks next."""
        parts: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        raw = b"".join(parts)
        with contextlib.suppress(ValueError):
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self.seen.append(Seen(scope["path"], headers, json.loads(raw) if raw else None))
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": raw, "more_body": False}

        return again


class Replica:
    """One engine, its server and how the gateway knows it."""

    def __init__(
        self, pool: Role, replica_id: str, fields: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> None:
        """`fields` are settings of the fake engine, `options` further arguments of its constructor."""
        self.pool = pool
        self.replica_id = replica_id
        self.kv_fit = ""
        self.health: Callable[[], EngineHealth] = unwatched
        """What its watchdog would say."""
        self._options = dict(options or {})
        self._config = FakeEngineConfig(type="fake", **fields)
        self._make()

    def _make(self) -> None:
        number = next(_numbers)
        self.incarnation = f"incarnation-{number}"
        self.key = f"key-{number}"
        self.engine = WatchedEngine(f"engine-{number}", self.pool, self._config, model_id=MODEL, **self._options)
        self.server = EngineServer(
            self.engine,
            role=self.pool,
            host="127.0.0.1",
            incarnation=self.incarnation,
            health=lambda: self.health(),
            requests=OpenRequests(),
            key=self.key,
        )

    async def start(self) -> None:
        await self.engine.start()
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop()
        await self.engine.shutdown()

    async def restart(self) -> None:
        """A new engine under the same replica id."""
        await self.stop()
        self._make()
        await self.start()

    def cut(self) -> None:
        """Break every open connection; it goes on listening."""
        uv = self.server._server
        assert uv is not None
        for connection in list(uv.server_state.connections):
            connection.transport.abort()

    def kill(self) -> None:
        """Die: nothing listens any more and every connection breaks."""
        uv = self.server._server
        assert uv is not None
        for listening in uv.servers:
            listening.close()
        self.cut()
        self._stopping = asyncio.ensure_future(self.engine._side_channel.stop())

    @property
    def info(self) -> ReplicaInfo:
        return ReplicaInfo(
            replica_id=self.replica_id,
            pool=self.pool,
            url=self.server.url,
            engine_id=self.engine.engine_id,
            incarnation=self.incarnation,
            block_size=self._config.block_size,
            vocab_size=WORD_BASE + NUM_WORDS,
            kv_source=self.engine.kv_source,
            secret=self.key,
            kv_fit=self.kv_fit,
        )

    @property
    def is_idle(self) -> bool:
        stats = self.engine.stats()
        return stats.num_requests_running + stats.num_requests_waiting == 0 and stats.kv_cache_usage == 0


class StubRenderer:
    """The fake engine's own tokeniser. `before` runs first, to hold a request there."""

    def __init__(self) -> None:
        self.before: Callable[[], Awaitable[None]] | None = None

    async def prompts(self, endpoint: Endpoint, body: Mapping[str, Any], num_bytes: int) -> list[list[int]] | None:
        if self.before is not None:
            await self.before()
        kind: fake_wire.Endpoint = "chat" if endpoint == "chat" else "completion"
        try:
            parsed = fake_wire.parse(kind, dict(body), model_id=MODEL, max_model_len=MAX_MODEL_LEN)
        except Exception:
            return None
        return [list(prompt) for prompt in parsed.prompts]

    async def texts(self, body: Mapping[str, Any], prompt: Sequence[int], token_ids: Sequence[int]) -> list[str]:
        return [word(token_id) for token_id in token_ids]

    def schemas(self) -> dict[str, Any]:
        return {body: {"type": "object", "properties": {"model": {"type": "string"}}} for body in get_args(Body)}


class StubScaler:
    """Remembers sizes; raises `error` when it is set."""

    def __init__(self) -> None:
        self.sizes: dict[str, int | None] = dict.fromkeys(POOLS)
        self.pending: dict[str, PoolPlan] = {}
        self.error: DisaggError | None = None

    async def plans(self) -> dict[str, PoolPlan]:
        plans = {name: self.pending.get(name, NOTHING_KNOWN) for name in self.sizes}
        return {name: replace(plan, target_num_replicas=self.sizes[name]) for name, plan in plans.items()}

    async def scale(self, pool: str, num_replicas: int) -> None:
        if self.error is not None:
            raise self.error
        self.sizes[pool] = num_replicas


@dataclass
class Reply:
    """Status, lower-case headers and body of one answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The payload of each SSE event."""
        return [part.removeprefix("data: ") for part in self.body.decode().split("\n\n") if part]

    @property
    def text(self) -> str:
        """The answer's text, streamed or whole, of its first choice."""
        bodies = [json.loads(e) for e in self.events if e != "[DONE]"] if self.body[:5] == b"data:" else [self.json()]
        choices = [choice for body in bodies for choice in body.get("choices", ()) if choice["index"] == 0]
        parts = [c.get("text") or (c.get("delta") or c.get("message") or {}).get("content") or "" for c in choices]
        return "".join(parts)


class Connection:
    """One client connection; several requests may follow each other on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def head(self) -> tuple[int, dict[str, str]]:
        status = int((await self.reader.readline()).split()[1])
        headers: dict[str, str] = {}
        while line := (await self.reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        size = int((await self.reader.readline()).split(b";")[0], 16)
        data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def reply(self, *, has_body: bool = True) -> Reply:
        status, headers = await self.head()
        if not has_body:
            return Reply(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            parts: list[bytes] = []
            while part := await self.chunk():
                parts.append(part)
            return Reply(status, headers, b"".join(parts))
        return Reply(status, headers, await self.reader.readexactly(int(headers.get("content-length", "0"))))

    def leave(self) -> None:
        """Go without saying goodbye."""
        self.writer.transport.abort()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def request_bytes(
    method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes, *, chunk_bytes: int | None = None
) -> bytes:
    """A request as it goes over the wire, with a length unless `headers` has one or `chunk_bytes` cuts it."""
    names = {name.lower() for name, _ in headers}
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [] if "host" in names else ["host: gateway"]
    lines += [f"{name}: {value}" for name, value in headers]
    if chunk_bytes is not None:
        lines.append("transfer-encoding: chunked")
        cut = [body[i : i + chunk_bytes] for i in range(0, len(body), chunk_bytes)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in cut) + b"0\r\n\r\n"
    elif "content-length" not in names and (body or method not in ("GET", "HEAD")):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


JSON_HEADERS = (("content-type", "application/json"),)


@dataclass
class Stack:
    """A running gateway and what is behind it."""

    url: str
    gateway: Gateway
    renderer: StubRenderer
    scaler: StubScaler
    prefill: list[Replica]
    decode: list[Replica]
    _options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def replicas(self) -> list[Replica]:
        return [*self.prefill, *self.decode]

    def announce(self) -> None:
        """Tell the gateway who is there, as Serve's routers would."""
        self.gateway.membership.replace(PREFILL, [r.info for r in self.prefill])
        self.gateway.membership.replace(DECODE, [r.info for r in self.decode])

    async def warmed(self) -> None:
        """Wait until every pair has moved KV."""
        await until(lambda: not self.gateway.membership.cold_pairs())

    async def settled(self) -> None:
        """Wait until nothing runs or is held in any engine; fail when that does not come."""
        await until(lambda: all(r.is_idle for r in self.replicas))

    async def join(self, pool: Role, replica_id: str, **fields: Any) -> Replica:
        replica = Replica(pool, replica_id, {**FAST, **fields}, self._options)
        await replica.start()
        (self.prefill if pool == "prefill" else self.decode).append(replica)
        self.announce()
        return replica

    def client(self, replica: Replica) -> ReplicaClient:
        """The gateway's client of a replica that is announced."""
        members = self.gateway.membership.members(replica.pool)
        return next(member.client for member in members if member.info.incarnation == replica.incarnation)

    def metric(self, name: str, **labels: str) -> float:
        return self.gateway.metrics.registry.get_sample_value(name, labels) or 0.0

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Sequence[tuple[str, str]] = JSON_HEADERS,
        *,
        chunk_bytes: int | None = None,
    ) -> Reply:
        """One request on a connection of its own. `body` is sent as JSON, bytes as they are."""
        payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        async with connected(self.url) as connection:
            connection.writer.write(request_bytes(method, path, headers, payload, chunk_bytes=chunk_bytes))
            return await connection.reply(has_body=method != "HEAD")

    async def complete(self, prompt: Any = "a prompt longer than one block of KV", **fields: Any) -> Reply:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 8} | fields
        return await self.call("POST", "/v1/completions", body)

    async def chat(self, text: str = "tell me something", **fields: Any) -> Reply:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 8} | fields
        return await self.call("POST", "/v1/chat/completions", body)

    @asynccontextmanager
    async def streaming(self, path: str = "/v1/completions", **fields: Any) -> AsyncIterator[Connection]:
        """A connection with a streamed request sent on it; nothing of the answer is read yet."""
        prompt: dict[str, Any] = {"prompt": "a prompt longer than one block of KV"}
        if "chat" in path:
            prompt = {"messages": [{"role": "user", "content": "tell me something"}]}
        body = {"model": MODEL, "max_tokens": 8, "stream": True} | prompt | fields
        async with connected(self.url) as connection:
            connection.writer.write(request_bytes("POST", path, JSON_HEADERS, json.dumps(body).encode()))
            yield connection


class QuietServer(uvicorn.Server):
    """A uvicorn server that leaves the process's signal handlers alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def running_stack(
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    spliced: bool = True,
    warm: bool = True,
    config: GatewayConfig | None = None,
    http: Any = None,
    transport: str = "nixl",
    lease_s: float = 30.0,
    shared_cache: FakeSharedCache | None = None,
    engine_arguments: Collection[str] = (),
    **fields: Any,
) -> AsyncIterator[Stack]:
    """A gateway with its engines, up and warm.

    Args:
        spliced: whether uvicorn speaks through `SplicingProtocol`; `http` names another protocol class.
        warm: wait until every pair has moved KV.
        transport: how the engines move KV, a key of `TRANSPORTS`.
        lease_s: how long prefill engines hold it, and decode engines wait for it where both legs are sent at once.
        shared_cache: the tier that all engines share.
        engine_arguments: those that a config may set.
        fields: settings of every fake engine; by default they take no time.
    """
    renderer, scaler = StubRenderer(), StubScaler()
    gateway = Gateway(
        model_id=MODEL,
        config=config or GatewayConfig(),
        renderer=renderer,
        scaler=scaler,
        max_model_len=MAX_MODEL_LEN,
        transport=TRANSPORTS[transport],
        engine_arguments=engine_arguments,
    )
    protocol = http or (SplicingProtocol if spliced else HttpToolsProtocol)
    server = QuietServer(
        uvicorn.Config(
            create_app(gateway), log_level="warning", access_log=False, http=protocol, timeout_graceful_shutdown=1
        )
    )
    sock = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[sock]))
    settings = {**FAST, **fields}
    options = {"transport": TRANSPORTS[transport], "kv_lease_duration_s": lease_s, "shared_cache": shared_cache}
    stack = Stack(
        url=f"http://127.0.0.1:{sock.getsockname()[1]}",
        gateway=gateway,
        renderer=renderer,
        scaler=scaler,
        prefill=[Replica("prefill", f"p{i}", settings, options) for i in range(num_prefill)],
        decode=[Replica("decode", f"d{i}", settings, options) for i in range(num_decode)],
        _options=options,
    )
    try:
        await asyncio.gather(*(replica.start() for replica in stack.replicas))
        await until(lambda: server.started)
        stack.announce()
        if warm:
            await stack.warmed()
        yield stack
    finally:
        server.should_exit = True
        await asyncio.gather(task, *(replica.stop() for replica in stack.replicas))
