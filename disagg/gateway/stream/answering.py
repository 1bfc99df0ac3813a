# SPDX-License-Identifier: Apache-2.0
"""Sends one answer to one client: the decode leg's bytes, or an error in their place.

A stream goes socket to socket when the client's connection is in this process (`splice`), else as ASGI messages. When
a client leaves, the gateway cancels everything that runs for its request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from disagg.config import GatewayConfig
from disagg.errors import ContextLengthError, StreamLimitError
from disagg.gateway.front import flags
from disagg.gateway.front.fields import wants_usage
from disagg.gateway.front.in_flight import InFlight
from disagg.gateway.front.intake import Asked
from disagg.gateway.front.leaving import disconnected
from disagg.gateway.front.render import Renderer
from disagg.gateway.front.responses import error_event, error_response, shape_of
from disagg.gateway.handoff.call import Call, Progress
from disagg.gateway.handoff.decoding import Answer
from disagg.gateway.handoff.handoff import Handoff
from disagg.gateway.handoff.losses import Losses
from disagg.gateway.replicas.membership import Membership
from disagg.gateway.shadow.shadow import Shadow
from disagg.gateway.stream.resume_rules import resume_plan
from disagg.gateway.stream.resuming import Resumer, Resuming
from disagg.gateway.stream.sent_tokens import SentTokens
from disagg.gateway.stream.splice import protocol_of, splice_of
from disagg.gateway.stream.usage import CorrectedStream, corrected
from disagg.observability.metrics import Metrics
from pools.errors import NoReplicaError, PoolOverloadedError, ReplicaLostError
from transport.errors import DisaggError

logger = logging.getLogger(__name__)

_NUM_RECENT = 4
"""Chunks: the last event with text, an error or usage, and a `[DONE]` that may come in two pieces."""
_OF_STREAMS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
"""Headers for what stands between a client and its stream. nginx holds a stream back without the second one."""


@dataclass(frozen=True)
class Answering:
    """Makes and sends the answers of one gateway replica."""

    renderer: Renderer
    membership: Membership
    handoff: Handoff
    resumer: Resumer
    shadow: Shadow | None
    in_flight: InFlight
    metrics: Metrics
    config: GatewayConfig
    echo_request_id: bool
    engine_arguments: Collection[str]
    """Engine arguments that a config may set."""

    def response(self, asked: Asked) -> Response:
        """The response to one request. The response runs the request while it is being sent.

        Raises PoolOverloadedError or NoReplicaError when the gateway takes no more requests.
        """
        self._check_room()
        if asked.store is not None:
            self.metrics.stores.labels(asked.store).inc()
        return _AnsweredCall(self, asked)

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Count a request as in flight until the block ends, without answering it. Raises what `response` raises."""
        self._check_room()
        self.in_flight.num += 1
        try:
            yield
        finally:
            self.in_flight.num -= 1

    def _check_room(self) -> None:
        """Raises PoolOverloadedError when the gateway carries as many requests as it may.

        Raises NoReplicaError when the replicas that are left only finish what they have.
        """
        if self.membership.roster.finishes_only:
            raise NoReplicaError("every replica that could answer leaves")
        if self.in_flight.num >= self.config.max_num_requests:
            raise PoolOverloadedError(
                f"the gateway carries {self.in_flight.num} requests, its limit (gateway.max_num_requests)"
            )


class _AnsweredCall(Response):
    """A response that runs its request while it is being sent: a client that leaves cancels both at once."""

    def __init__(self, to: Answering, asked: Asked) -> None:
        super().__init__()
        self._to = to
        self._metrics = to.metrics
        self._config = to.config
        self._asked = asked
        self._request_id = asked.request_id
        self._progress = Progress()
        self._recent: deque[bytes] = deque(maxlen=_NUM_RECENT)
        """The last chunks of a stream that were sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        left = False

        def client_left(_: asyncio.Task[None]) -> None:
            nonlocal left
            if not watch.cancelled():
                left = True
                task.cancel()

        watch = asyncio.ensure_future(disconnected(receive))
        watch.add_done_callback(client_left)
        try:
            self._to.in_flight.num += 1
            await self._run(scope, receive, send)
        except asyncio.CancelledError:
            self._metrics.disconnects.labels(self._progress.phase).inc()
            if not left:
                # Serve's own proxy cancels the request of a client that leaves, mostly before this one has read of it.
                raise
            task.uncancel()
        finally:
            self._to.in_flight.num -= 1
            watch.remove_done_callback(client_left)
            watch.cancel()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        losses = Losses()
        try:
            call = await self._rendered()
            plan = resume_plan(call)
            check = self._to.shadow.begin(plan.call) if self._to.shadow else None
            answer = await self._to.handoff.answer(check.call if check else plan.call, losses)
        except DisaggError as exc:
            await self._refusal(exc)(scope, receive, self._limited(scope, send))
            return
        send = self._limited(scope, send)
        self._metrics.first_byte_seconds.observe(time.perf_counter() - started)
        self._count(answer.mode, answer.status)
        sent: SentTokens | None = None
        try:
            if answer.exchange is None:
                content = check.taken(answer) if check else answer.content
                if answer.cached is not None:
                    await answer.cached.known()
                    content = corrected(content, answer.cached)
                await self._send_whole(answer, content, send)
            else:
                resuming = self._to.resumer.begin(plan, losses)
                sent = resuming.sent
                await self._send_stream(answer, resuming, scope, send)
            if check is not None:
                check.over(answer, sent)
        finally:
            answer.close()

    async def _rendered(self) -> Call:
        """The request with its token ids. Raises ContextLengthError.

        A request that could not be rendered has none. A decode engine has to look at it, mostly to refuse it.
        """
        asked = self._asked
        # Large bodies wait for each other here. Those that are rendered are sent on at once.
        with self._metrics.render_seconds.time(), asked.held:
            prompts = await self._to.renderer.prompts(asked.endpoint, asked.body, len(asked.raw))
        limit = self._config.max_prompt_tokens
        if limit is not None and prompts is not None:
            check_prompt_tokens(prompts, limit)
        return Call(
            asked.endpoint,
            asked.body,
            asked.raw,
            prompts,
            asked.request_id,
            asked.trace,
            asked.store,
            asked.tenant,
            self._progress,
        )

    def _refusal(self, error: DisaggError) -> Response:
        if isinstance(error, ReplicaLostError):
            logger.warning("request %s was lost: %s", self._request_id, error)
        headers = {"x-request-id": self._request_id} if self._to.echo_request_id else {}
        self._count("none", shape_of(error).status)
        return error_response(error, headers)

    def _head(self, answer: Answer, *others: tuple[bytes, bytes]) -> Message:
        headers = [
            (b"content-type", answer.content_type.encode("latin-1")),
            (b"x-disagg-prefill", answer.prefill_id.encode()),
            (b"x-disagg-decode", answer.decode_id.encode()),
        ]
        if self._to.echo_request_id:
            headers.append((b"x-request-id", self._request_id.encode()))
        return {"type": "http.response.start", "status": answer.status, "headers": [*headers, *others]}

    async def _send_whole(self, answer: Answer, content: bytes, send: Send) -> None:
        if answer.status >= 400:
            content = flags.in_answer(content, self._to.engine_arguments)
        await send(self._head(answer, (b"content-length", b"%d" % len(content))))
        await send({"type": "http.response.body", "body": content})

    async def _send_stream(self, answer: Answer, resuming: Resuming, scope: Scope, send: Send) -> None:
        await send(self._head(answer, *_OF_STREAMS))
        usage = CorrectedStream(answer.cached) if answer.cached and wants_usage(self._asked.body) else None
        content = resuming.sent.feed(answer.content) if resuming.sent else answer.content
        content = usage.feed(content) if usage else content
        content = flags.in_first_chunk(content, self._to.engine_arguments)
        await send({"type": "http.response.body", "body": content, "more_body": True})
        self._recent.append(content)
        self._progress.phase = "stream"
        streaming = self._stream(answer, resuming, usage, scope, send)
        last = await within(streaming, self._config.max_stream_s, self._over_limit)
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
        limit, call_later = self._config.client_stall_timeout_s, asyncio.get_running_loop().call_later

        async def limited(message: Message) -> None:
            cut = call_later(limit, protocol.transport.abort)
            try:
                await send(message)
            finally:
                cut.cancel()

        return limited

    async def _stream(
        self, answer: Answer, resuming: Resuming, usage: CorrectedStream | None, scope: Scope, send: Send
    ) -> bytes:
        """Send the rest of the stream, from whatever replicas. Returns the bytes that have to follow it."""

        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._recent.append(data)

        try:
            await self._carry(answer, resuming, usage, scope, send)
            resuming.check(self._last)
        except ReplicaLostError as exc:
            if self._client_stalled(answer):
                self._metrics.broken_streams.inc()
                logger.warning("stream %s is cut: %s", self._request_id, exc)
                lost = ReplicaLostError(str(exc), reason="the client took nothing of it")
                return apart(self._last, error_event(lost))
            return apart(self._last, await resuming.run(answer, exc, write))
        whole_events = resuming.sent or usage
        return whole_events.unfinished() if whole_events else b""

    async def _carry(
        self, answer: Answer, resuming: Resuming, usage: CorrectedStream | None, scope: Scope, send: Send
    ) -> None:
        """Send what comes from the first replica. Raises ReplicaLostError."""
        assert answer.exchange is not None
        through: Callable[[bytes], bytes] | None = resuming.sent.feed if resuming.sent else None
        if usage is not None:
            through = _both(through, usage.feed)
        if (protocol := splice_of(scope)) is not None:
            self._metrics.streams.labels("splice").inc()
            if usage is not None:
                through = _both(through, self._noted)
            await protocol.splice(answer.exchange, through, noted=self._recent.append)
            return
        self._metrics.streams.labels("asgi").inc()
        while (chunk := await answer.exchange.next_chunk()) is not None:
            data = chunk if through is None else through(chunk)
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._recent.append(data)

    def _noted(self, data: bytes) -> bytes:
        self._recent.append(data)
        return data

    def _client_stalled(self, answer: Answer) -> bool:
        """Whether the stream broke because the client took nothing. Nobody would read a resumed stream then."""
        assert answer.exchange is not None
        paused_at = answer.exchange.paused_at
        limit = self._config.client_stall_timeout_s
        return paused_at is not None and asyncio.get_running_loop().time() - paused_at >= limit

    def _over_limit(self, error: StreamLimitError) -> bytes:
        self._metrics.stream_limits.inc()
        return apart(self._last, error_event(error))

    def _count(self, mode: str, status: int) -> None:
        self._metrics.requests.labels(self._asked.endpoint, mode, str(status)).inc()


def check_prompt_tokens(prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Raises ContextLengthError when a prompt is longer than `max_tokens`."""
    longest = max(map(len, prompts), default=0)
    if longest > max_tokens:
        raise ContextLengthError(
            f"the prompt has {longest} tokens, this server takes {max_tokens}; shorten it", param="prompt"
        )


def apart(sent: bytes, events: bytes) -> bytes:
    """`events` as they follow a stream that was cut: on a line of their own, even if the stream stopped in mid-event.

    Args:
        sent: the last bytes that were sent. A blank line too many does no harm, because readers ignore it.
        events: whole events, or nothing.
    """
    return b"\n\n" + events if events and sent and not sent.endswith(b"\n\n") else events


async def within(streaming: Awaitable[bytes], limit_s: float | None, end: Callable[[StreamLimitError], bytes]) -> bytes:
    """What `streaming` returns. After `limit_s` seconds, cancels it and returns what `end` makes of the error."""
    if limit_s is None:
        return await streaming
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            return await streaming
    except TimeoutError:
        if not limit.expired():
            raise
        return end(StreamLimitError(f"the stream took longer than {limit_s:g} s, the limit of this server"))


def _both(first: Callable[[bytes], bytes] | None, then: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return then if first is None else lambda data: then(first(data))
