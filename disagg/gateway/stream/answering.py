# SPDX-License-Identifier: Apache-2.0
"""Sends one answer to one client: the decode leg's bytes, or the error that stands for them.

A stream goes socket to socket when the client's connection is in this process (`splice`), else as ASGI messages. A
client that leaves cancels everything that runs for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from disagg.config import GatewayConfig
from disagg.errors import RateLimitError, StreamLimitError
from disagg.gateway.front.limits import apart, within
from disagg.gateway.front.render import Renderer
from disagg.gateway.front.responses import error_event, error_response, shape_of
from disagg.gateway.handoff.handoff import Answer, Call, Handoff
from disagg.gateway.handoff.sending import Progress
from disagg.gateway.shadow.shadow import Shadow
from disagg.gateway.stream.resuming import Resuming
from disagg.gateway.stream.splice import protocol_of, splice_of
from disagg.observability.metrics import Metrics
from pools.errors import NoReplicaError, ReplicaLostError
from transport.errors import DisaggError

logger = logging.getLogger(__name__)

_NUM_RECENT = 4
"""Chunks: the last event with text, an error or usage, and a `[DONE]` that may come in two pieces."""


class Carrier(Protocol):
    """What a response needs of the gateway."""

    handoff: Handoff
    metrics: Metrics
    config: GatewayConfig
    renderer: Renderer
    shadow: Shadow | None
    num_in_flight: int
    echo_request_id: bool


class AnsweredCall(Response):
    """A response that runs its request while it is being sent, so that leaving and answering share one scope."""

    def __init__(
        self, prepare: Callable[[], Awaitable[Call]], carrier: Carrier, *, request_id: str, endpoint: str
    ) -> None:
        super().__init__()
        self._prepare = prepare
        self._carrier = carrier
        self._handoff = carrier.handoff
        self._metrics = carrier.metrics
        self._request_id = request_id
        self._endpoint = endpoint
        self._progress = Progress()
        self._recent: deque[bytes] = deque(maxlen=_NUM_RECENT)
        """What was sent of a stream last."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        left = False

        def client_left(_: asyncio.Task[None]) -> None:
            nonlocal left
            if not watch.cancelled():
                left = True
                task.cancel()

        watch = asyncio.ensure_future(_disconnected(receive))
        watch.add_done_callback(client_left)
        self._carrier.num_in_flight += 1
        try:
            await self._run(scope, receive, self._limited(scope, send))
        except asyncio.CancelledError:
            if not left:
                raise
            self._metrics.disconnects.labels(self._progress.phase).inc()
            task.uncancel()
        finally:
            self._carrier.num_in_flight -= 1
            watch.remove_done_callback(client_left)
            watch.cancel()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        mode = "none"
        try:
            call = await self._prepare()
            self._progress = call.progress
            resuming = Resuming(call, self._carrier)
            check = self._carrier.shadow.begin(resuming.call) if self._carrier.shadow else None
            answer = await self._handoff.answer(check.call if check else resuming.call, resuming.losses)
        except DisaggError as exc:
            if isinstance(exc, ReplicaLostError):
                logger.warning("request %s was lost: %s", self._request_id, exc)
            headers = {"x-request-id": self._request_id} if self._carrier.echo_request_id else {}
            if isinstance(exc, NoReplicaError | RateLimitError):
                headers["retry-after"] = str(self._carrier.config.retry_after_s)
            self._count(mode, shape_of(exc).status)
            await error_response(exc, headers)(scope, receive, send)
            return
        mode = answer.mode
        self._metrics.first_byte_seconds.observe(time.perf_counter() - started)
        self._count(mode, answer.status)
        try:
            if check is not None:
                check.begun(answer)
            await self._send(answer, resuming, scope, send)
            if check is not None:
                check.over(answer)
        finally:
            answer.close()

    async def _send(self, answer: Answer, resuming: Resuming, scope: Scope, send: Send) -> None:
        headers = [
            (b"content-type", answer.content_type.encode("latin-1")),
            (b"x-disagg-prefill", answer.prefill_id.encode()),
            (b"x-disagg-decode", answer.decode_id.encode()),
        ]
        if self._carrier.echo_request_id:
            headers.append((b"x-request-id", self._request_id.encode()))
        if answer.exchange is None:
            headers.append((b"content-length", b"%d" % len(answer.content)))
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": answer.content})
            return
        headers.append((b"cache-control", b"no-cache"))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        answer.sent = resuming.sent
        content = answer.sent.feed(answer.content) if answer.sent else answer.content
        await send({"type": "http.response.body", "body": content, "more_body": True})
        self._recent.append(content)
        self._progress.phase = "stream"
        streaming = self._stream(answer, resuming, scope, send)
        last = await within(streaming, self._carrier.config.max_stream_s, self._over_limit)
        await send({"type": "http.response.body", "body": last})

    @property
    def _last(self) -> bytes:
        """The end of what was sent of a stream."""
        return b"".join(self._recent)

    def _limited(self, scope: Scope, send: Send) -> Send:
        """`send`, which cuts the connection of a client that takes nothing: it could hold a request for ever."""
        protocol = protocol_of(scope)
        if protocol is None:
            return send
        limit, call_later = self._carrier.config.client_stall_timeout_s, asyncio.get_running_loop().call_later

        async def limited(message: Message) -> None:
            cut = call_later(limit, protocol.transport.abort)
            try:
                await send(message)
            finally:
                cut.cancel()

        return limited

    async def _stream(self, answer: Answer, resuming: Resuming, scope: Scope, send: Send) -> bytes:
        """Send the rest of the stream, whatever replicas it comes from; returns what has to follow it."""

        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._recent.append(data)

        try:
            await self._carried(answer, scope, send)
            resuming.check(self._last)
        except ReplicaLostError as exc:
            if self._client_stalled(answer):
                self._metrics.broken_streams.inc()
                logger.warning("stream %s is cut: %s", self._request_id, exc)
                lost = ReplicaLostError(str(exc), reason="the client took nothing of it")
                return apart(self._last, error_event(lost))
            return apart(self._last, await resuming.run(answer, exc, write))
        return answer.sent.rest() if answer.sent else b""

    async def _carried(self, answer: Answer, scope: Scope, send: Send) -> None:
        """Send what comes from the first replica. Raises ReplicaLostError."""
        assert answer.exchange is not None
        through = answer.sent.feed if answer.sent else None
        if (protocol := splice_of(scope)) is not None:
            self._metrics.streams.labels("splice").inc()
            await protocol.splice(answer.exchange, through, noted=self._recent.append)
            return
        self._metrics.streams.labels("asgi").inc()
        while (chunk := await answer.exchange.next_chunk()) is not None:
            data = chunk if through is None else through(chunk)
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._recent.append(data)

    def _client_stalled(self, answer: Answer) -> bool:
        """Whether it was the client that stood still, so that nobody would read how the stream goes on."""
        assert answer.exchange is not None
        paused_at = answer.exchange.paused_at
        limit = self._carrier.config.client_stall_timeout_s
        return paused_at is not None and asyncio.get_running_loop().time() - paused_at >= limit

    def _over_limit(self, error: StreamLimitError) -> bytes:
        self._metrics.stream_limits.inc()
        return apart(self._last, error_event(error))

    def _count(self, mode: str, status: int) -> None:
        self._metrics.requests.labels(self._endpoint, mode, str(status)).inc()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
