# SPDX-License-Identifier: Apache-2.0
"""The client of one replica: a method for each thing that a gateway asks of it.

The client adds deadlines, trace context and counters to a leg. It retries nothing, has no fallback, and knows nothing
of hand-offs beyond their parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from pools.client import routes
from pools.client.events import ReadEvents, read_events
from pools.client.http1 import Exchange, Upstream
from pools.client.messages import (
    Abort,
    Aborted,
    PrefillReply,
    Probe,
    Probed,
    ReplicaHealth,
    ReplicaStats,
    Settle,
    Settled,
    is_server_fault,
    prefill_reply,
)
from pools.client.request_fields import priority_of
from pools.engine.base import HANDOFF_HEADER
from pools.errors import ReplicaLostError, UnusableAnswerError

T = TypeVar("T")
Trace = Mapping[str, str]
"""W3C trace context: headers that every leg of a request carries."""
NO_TRACE: Trace = {}

LegKind = Literal["prefill", "decode", "probe", "check"]
Outcome = Literal["answered", "lost", "given_up"]
"""How a leg went: `answered` when its answer or the first bytes of its stream came, `lost` when the replica was lost or
late before that, `given_up` when the sender stopped waiting before that."""

STATS_TIMEOUT_S = 2.0
CLEANUP_TIMEOUT_S = 10.0
_POLL_TIMEOUT_S = 10.0
"""How long a read of events may take beyond the time that the replica was asked to wait."""
_ERROR_EVENT = b'data: {"error"'
_MAX_QUOTED = 200

_encode = msgspec.json.Encoder().encode


class LegObserver(Protocol):
    """Is told of every leg, to count it. Must not block."""

    def leg_over(self, kind: LegKind, outcome: Outcome, seconds: float) -> None:
        """The client calls this when a leg has its answer or the first bytes of its stream, or will get neither.

        `seconds` is the time since the client began the leg, connecting included.
        """
        ...


@dataclass(frozen=True)
class Limits:
    """How long an exchange may stand still, in seconds."""

    first_byte_timeout_s: float
    idle_timeout_s: float
    stall_timeout_s: float
    """How long the reader of a stream may take nothing."""


@dataclass(frozen=True)
class Forwarded:
    """A replica's answer, which the client passes on without reading it."""

    status: int
    payload: bytes


class OpenedLeg:
    """A decode leg whose head and first bytes have arrived. The caller closes it, finished or not."""

    def __init__(self, exchange: Exchange, content: bytes, *, streaming: bool) -> None:
        self.status = exchange.status
        self.content_type = (exchange.header(b"content-type") or b"application/json").decode("latin-1")
        self.content = content
        """The whole body, or the first chunk of a stream."""
        self.exchange = exchange if streaming else None
        """The rest of a stream; None when `content` is everything."""
        self.complete = exchange.complete
        """Whether the whole response has arrived."""

    def close(self) -> None:
        """End the leg, which stops the request in the engine. Idempotent."""
        if self.exchange is not None:
            self.exchange.close()


class ReplicaClient:
    """One replica, by its address and key. Belongs to one event loop.

    Every request raises ReplicaLostError when the replica cannot be reached, breaks off, or is late. `probe`, `abort`,
    `settle`, `health`, `stats` and `events` raise UnusableAnswerError when the replica answers something else.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None,
        connect_timeout_s: float,
        observer: LegObserver | None,
    ) -> None:
        """Connects to nothing yet. `key`: the key that the replica requires with each request, None for none."""
        self.url = url
        self._upstream = Upstream(url, connect_timeout_s=connect_timeout_s, key=key)
        self._observer = observer
        self.closed = False

    # Legs

    async def prefill(self, body: bytes, *, leg_id: str, trace: Trace, timeout_s: float) -> PrefillReply:
        """Send a prefill leg and read its whole answer."""
        headers = {routes.REQUEST_ID_HEADER: leg_id, **trace}
        with _Observed(self._observer, "prefill"):
            status, payload = await self._upstream.request(
                "POST", routes.COMPLETIONS, body, headers, timeout_s=timeout_s
            )
        return prefill_reply(status, payload)

    async def check(self, body: bytes, *, leg_id: str, timeout_s: float) -> Forwarded:
        """Send a completion that no client waits for, and read its whole answer."""
        headers = {routes.REQUEST_ID_HEADER: leg_id}
        with _Observed(self._observer, "check"):
            return Forwarded(
                *await self._upstream.request("POST", routes.COMPLETIONS, body, headers, timeout_s=timeout_s)
            )

    async def decode(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str,
        trace: Trace,
        handoff_id: str | None = None,
        on_sent: Callable[[], None] = lambda: None,
    ) -> OpenedLeg:
        """Send a decode leg, and wait for the first bytes of its stream, or for its whole answer when it is no stream.

        `sweep` limits how long the leg may stand still.

        Args:
            handoff_id: the hand-off that `body` names. The engine reports it as `unread` if the leg ends before the
                engine has admitted it.
            on_sent: called as soon as the leg may have reached the engine.
        """
        headers = {routes.REQUEST_ID_HEADER: request_id, **trace}
        if handoff_id is not None:
            headers[HANDOFF_HEADER] = handoff_id
        exchange: Exchange | None = None
        try:
            with _Observed(self._observer, "decode"):
                exchange = await self._upstream.open("POST", path, body, headers)
                on_sent()
                status = await exchange.head()
                # Not the body's `stream`: vLLM takes "yes" and 1 for true.
                streaming = status == 200 and (exchange.header(b"content-type") or b"").startswith(b"text/event-stream")
                content = (await exchange.next_chunk() or b"") if streaming else await exchange.read()
                if streaming and content.startswith(_ERROR_EVENT) and is_server_fault(content):
                    raise ReplicaLostError(f"the engine at {self.url} failed before its first token", gone=True)
        except BaseException:
            if exchange is not None:
                exchange.close()
            raise
        return OpenedLeg(exchange, content, streaming=streaming)

    async def probe(
        self,
        prompt_token_ids: Sequence[int],
        params: Mapping[str, Any] | None,
        *,
        trace: Trace,
        timeout_s: float,
        asked: Mapping[str, Any] | None = None,
        on_sent: Callable[[], None] = lambda: None,
    ) -> Probed:
        """Run one token through the engine. The caller wants the KV that is computed or moved for it, not the token.

        Args:
            asked: the body of the client's request that the probe is for, if it is for one.
        """
        asked = asked or {}
        body = _encode(
            Probe(
                list(prompt_token_ids),
                None if params is None else dict(params),
                asked.get("cache_salt"),
                priority_of(asked),
                asked.get("session_id"),
            )
        )
        with _Observed(self._observer, "probe"):
            status, payload = await self._upstream.request(
                "POST", routes.PROBE, body, trace, timeout_s=timeout_s, on_sent=on_sent
            )
        return self._read(_decode_probed, routes.PROBE, status, payload)

    # The end of legs and hand-offs

    async def abort(self, request_id: str) -> bool:
        """Stop the request that carries this id. Returns whether it was running."""
        said = await self._tell(_decode_aborted, routes.ABORT, Abort(request_id), CLEANUP_TIMEOUT_S)
        return said.aborted

    async def settle(self, handoff_ids: Sequence[str]) -> None:
        """Tell the engine that nobody will read these hand-offs, so that it ends its hold of their KV."""
        await self._tell(_decode_settled, routes.SETTLE, Settle(list(handoff_ids)), CLEANUP_TIMEOUT_S)

    # What the replica reports

    async def health(self, *, timeout_s: float) -> ReplicaHealth:
        """What the replica's process knows of its engine."""
        return await self._ask(_decode_health, routes.HEALTH, timeout_s)

    async def stats(self, *, timeout_s: float = STATS_TIMEOUT_S) -> ReplicaStats:
        """The latest statistics."""
        return await self._ask(_decode_stats, routes.STATS, timeout_s)

    async def events(self, after: int, *, wait_s: float, reader: str | None = None, done: bool = False) -> ReadEvents:
        """Events numbered above `after`; waits up to `wait_s` seconds for the first.

        Args:
            reader: name of the gateway that reads. A replica that leaves the pool waits for its readers.
            done: whether this gateway sends no more requests to the replica.
        """
        standing = f"&reader={reader}&done={int(done)}" if reader else ""
        path = f"{routes.EVENTS}?after={after}&wait_s={wait_s:g}{standing}"
        return await self._ask(read_events, path, wait_s + _POLL_TIMEOUT_S)

    async def forward(self, method: str, path: str, body: bytes, *, timeout_s: float) -> Forwarded:
        """Send a request to a route of the engine's OpenAI app that needs no KV."""
        return Forwarded(*await self._upstream.request(method, path, body, timeout_s=timeout_s))

    # Its connections

    def fail(self, error: ReplicaLostError) -> None:
        """Fail the requests under way, so that the gateway can run them elsewhere. Later requests are sent as usual."""
        self._upstream.fail(error)

    def sweep(self, now: float, limits: Limits) -> None:
        """Fail exchanges that have stood still too long, and close connections nobody has used."""
        self._upstream.sweep(
            now,
            first_byte_timeout_s=limits.first_byte_timeout_s,
            idle_timeout_s=limits.idle_timeout_s,
            stall_timeout_s=limits.stall_timeout_s,
        )

    def close(self) -> None:
        """Keep no connection: idle ones close now, the others when their exchange ends. Requests can still be sent."""
        self.closed = True
        self._upstream.close()

    @property
    def is_over(self) -> bool:
        """Whether the client is closed and has no exchange under way that `sweep` has to watch."""
        return self.closed and self._upstream.is_idle

    async def _ask(self, decode: Callable[[bytes], T], path: str, timeout_s: float) -> T:
        return self._read(decode, path, *await self._upstream.request("GET", path, timeout_s=timeout_s))

    async def _tell(self, decode: Callable[[bytes], T], path: str, body: msgspec.Struct, timeout_s: float) -> T:
        answer = await self._upstream.request("POST", path, _encode(body), timeout_s=timeout_s)
        return self._read(decode, path, *answer)

    def _read(self, decode: Callable[[bytes], T], path: str, status: int, payload: bytes) -> T:
        if status == 200:
            try:
                return decode(payload)
            except ValueError as exc:
                raise UnusableAnswerError(f"{self.url}{path} answered what cannot be read: {exc}") from exc
        raise UnusableAnswerError(f"{self.url}{path} answered {status}: {payload[:_MAX_QUOTED]!r}", status=status)


class _Observed:
    """Tells the observer how one leg went when the `with` block ends.

    This is a class, because a generator costs more time than the rest of a leg.
    """

    __slots__ = ("_began", "_kind", "_observer")

    def __init__(self, observer: LegObserver | None, kind: LegKind) -> None:
        self._observer = observer
        self._kind = kind
        self._began = time.perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._observer is None:
            return
        outcome: Outcome = "answered" if exc is None else "lost" if isinstance(exc, ReplicaLostError) else "given_up"
        self._observer.leg_over(self._kind, outcome, time.perf_counter() - self._began)


_decode_aborted = msgspec.json.Decoder(Aborted).decode
_decode_settled = msgspec.json.Decoder(Settled).decode
_decode_probed = msgspec.json.Decoder(Probed).decode
_decode_health = msgspec.json.Decoder(ReplicaHealth).decode
_decode_told = msgspec.json.Decoder(dict[str, Any]).decode


def _decode_stats(payload: bytes) -> ReplicaStats:
    return ReplicaStats.from_told(_decode_told(payload))
