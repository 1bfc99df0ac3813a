# SPDX-License-Identifier: Apache-2.0
"""Resumes a stream on another replica when its decode replica is lost, as `resume_rules` decides."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from disagg.config import GatewayConfig
from disagg.errors import InvalidRequestError
from disagg.gateway.backoff import Backoff
from disagg.gateway.front.render import Renderer
from disagg.gateway.front.responses import error_event
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.decoding import Answer
from disagg.gateway.handoff.handoff import Handoff
from disagg.gateway.handoff.losses import Losses
from disagg.gateway.stream.resume_body import continued, num_left
from disagg.gateway.stream.resume_rules import Cut, ResumePlan, cut_for, is_greedy
from disagg.gateway.stream.resumed_stream import DivergedError, ResumedStream, ending, finished
from disagg.gateway.stream.sent_tokens import DONE, SentTokens, fault_in
from disagg.observability.metrics import Metrics
from pools.errors import AttemptsExhaustedError, ReplicaLostError
from transport.errors import DisaggError

logger = logging.getLogger(__name__)

_NOBODY = "no other replica went on with it"
_FIRST_RETRY_S = 0.1
_MAX_RETRY_S = 2.0
"""Longest wait between two tries to resume a stream while no decode replica can take it."""

Write = Callable[[bytes], Awaitable[None]]


class Refused(Exception):
    """The stream cannot go on; the message says why."""


@dataclass(frozen=True)
class Resumer:
    """Resumes the streams of one gateway replica."""

    handoff: Handoff
    renderer: Renderer
    metrics: Metrics
    config: GatewayConfig

    def begin(self, plan: ResumePlan, losses: Losses) -> Resuming:
        """Take charge of a stream before its first byte is sent. `losses`: what its request has lost until then."""
        return Resuming(self, plan, losses)


class Resuming:
    """One request's stream, which outlives the replicas that it comes from."""

    def __init__(self, resumer: Resumer, plan: ResumePlan, losses: Losses) -> None:
        self._plan = plan
        self._asked = plan.asked
        self._handoff = resumer.handoff
        self._renderer = resumer.renderer
        self._metrics = resumer.metrics
        self._config = resumer.config
        self._losses = losses
        self.sent = None if plan.refusal else SentTokens(plan.asked.endpoint, client_ids=plan.client_ids)
        """What the first replica's bytes have to pass through; None when the stream cannot be resumed."""

    def check(self, last: bytes) -> None:
        """Check the end of the first replica's stream. Raises ReplicaLostError when the answer is not complete.

        Args:
            last: the end of what the client was sent.
        """
        if self.sent is not None:
            _check_whole(self.sent.fault, done=self.sent.done)
        elif (fault := fault_in(last)) is not None:
            # The client has this error event already, and `[DONE]` after it.
            self._metrics.resumes.labels("refused").inc()
            self._metrics.broken_streams.inc()
            logger.warning("stream %s was cut by its engine: %s", self._asked.request_id, _words(fault))
        else:
            _check_whole(None, done=last.endswith(DONE))

    async def run(self, answer: Answer, error: ReplicaLostError, write: Write) -> bytes:
        """Resume the stream after the loss of the replica that gave `answer`. Returns the bytes that end the stream.

        Args:
            write: sends the events of later replicas to the client.
        """
        while True:
            answer.close()
            lost_at = asyncio.get_running_loop().time()
            lost_id = answer.decode_id
            self._losses.add_stream(lost_id, answer.decode_fit)
            try:
                if (end := self._ending()) is not None:
                    return end
                cut = await self._cut()
                if (left := num_left(self._asked, cut.num_tokens)) is not None and left <= 0 and not cut.overlap:
                    return self._finish()
                answer = await self._again(cut)
            except Refused as exc:
                return self._give_up("refused", error, exc)
            except DisaggError as exc:
                return self._give_up("failed", error, exc)
            logger.info(
                "stream %s goes on at replica %s after %d tokens, for %s was lost: %s",
                self._asked.request_id,
                answer.decode_id,
                cut.num_tokens,
                lost_id,
                error,
            )
            try:
                await self._carry(answer, cut, write, lost_at)
            except ReplicaLostError as exc:
                error = exc
            except DivergedError as exc:
                self._metrics.resume_diverged.inc()
                pair = f"{lost_id} and {answer.decode_id}"
                logger.error("replicas %s continue one greedy answer differently: %s", pair, exc)
                return self._give_up("failed", error, exc)
            else:
                return b""
            finally:
                answer.close()

    def _ending(self) -> bytes | None:
        """The events that the client still lacks when it has all tokens; None when it lacks tokens."""
        if self.sent is None:
            return None
        self.sent.parse()
        missing = ending(
            self.sent,
            self._asked.body,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached=min(self._asked.reached.measured, self._num_prompt_tokens),
            chat=self._asked.endpoint == "chat",
        )
        if missing is not None:
            self._metrics.resumes.labels("resumed").inc()
        return missing

    async def _cut(self) -> Cut:
        sent = self.sent
        if sent is None or sent.refusal is not None:
            raise Refused(f"it cannot be resumed ({self._plan.refusal if sent is None else sent.refusal})")
        if self._exhausted:
            raise AttemptsExhaustedError(f"{self._losses.count} replicas were lost on it, the limit")
        assert self._asked.prompts is not None
        texts = await self._renderer.texts(self._asked.body, self._asked.prompts[0], sent.token_ids)
        cut = cut_for(self._asked.body, texts, sent.text, client_ids=self._plan.client_ids)
        if isinstance(cut, str):
            raise Refused(f"it cannot be resumed ({cut})")
        return cut

    async def _again(self, cut: Cut) -> Answer:
        """The answer of another replica. Waits up to `gateway.resume_wait_s` for one. Raises DisaggError."""
        assert self.sent is not None
        call = continued(self._plan.call, self.sent.token_ids[: cut.num_tokens])
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.resume_wait_s
        backoff = Backoff(_FIRST_RETRY_S, _MAX_RETRY_S)
        while True:
            try:
                return await self._begun(call)
            except DisaggError as exc:
                final = self._exhausted or isinstance(exc, AttemptsExhaustedError | InvalidRequestError)
                left = deadline - loop.time()
                if final or left <= 0:
                    raise
                await asyncio.sleep(min(backoff.next_s(), left))

    async def _begun(self, call: Call) -> Answer:
        """Try once to resume. Raises DisaggError; an InvalidRequestError when every replica would refuse alike."""
        answer = await self._handoff.resume(call, self._losses)
        if answer.exchange is not None:
            return answer
        answer.close()
        message = f"the replica that was to go on answered {answer.status}"
        # A replica whose engine has just died answers 5xx until its process ends.
        raise ReplicaLostError(message, reason=message) if answer.status >= 500 else InvalidRequestError(message)

    async def _carry(self, answer: Answer, cut: Cut, write: Write, lost_at: float) -> None:
        """Send the rest of the answer. Raises ReplicaLostError or DivergedError."""
        assert self.sent is not None and answer.exchange is not None
        stream = ResumedStream(
            self.sent,
            cut,
            num_prompt_tokens=self._num_prompt_tokens,
            client_ids=self._plan.client_ids,
            greedy=is_greedy(self._asked.body),
            cached=answer.cached,
        )
        chunk: bytes | None = answer.content
        begun = False
        try:
            while chunk is not None:
                if data := stream.feed(chunk):
                    if not begun:
                        begun = True
                        self._metrics.resumes.labels("resumed").inc()
                        self._metrics.resume_gap_seconds.observe(asyncio.get_running_loop().time() - lost_at)
                    await write(data)
                chunk = await answer.exchange.next_chunk()
        finally:
            stream.close()
        _check_whole(stream.fault, done=self.sent.done)

    @property
    def _exhausted(self) -> bool:
        return self._losses.count >= self._config.max_attempts

    @property
    def _num_prompt_tokens(self) -> int:
        assert self._asked.prompts is not None
        return len(self._asked.prompts[0])

    def _finish(self) -> bytes:
        assert self.sent is not None
        chat = self._asked.endpoint == "chat"
        return finished(self.sent, self._asked.body["model"], chat=chat) + (self._ending() or b"")

    def _give_up(self, outcome: str, lost: ReplicaLostError, why: Refused | DisaggError | DivergedError) -> bytes:
        self._metrics.resumes.labels(outcome).inc()
        self._metrics.broken_streams.inc()
        logger.warning("stream %s is cut: %s; %s", self._asked.request_id, lost, why)
        reason = why.reason or _NOBODY if isinstance(why, ReplicaLostError) else str(why)
        return error_event(ReplicaLostError(str(lost), reason=reason))


def _check_whole(fault: bytes | None, *, done: bool) -> None:
    if fault is not None:
        raise ReplicaLostError(f"the engine broke off: {_words(fault)}", gone=True)
    if not done:
        raise ReplicaLostError("the engine's stream ended without [DONE]", gone=True)


def _words(event: bytes) -> str:
    """The payload of an event, for the log."""
    return event.decode(errors="replace").strip()[6:306]
