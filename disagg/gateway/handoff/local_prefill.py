# SPDX-License-Identifier: Apache-2.0
"""Requests without a hand-off: the gateway sends them on as they came, and one replica computes prompt and answer.

That is a decode replica, or a prefill replica where no decode replica can."""

from __future__ import annotations

import asyncio

from disagg.config import GatewayConfig
from disagg.errors import RateLimitError
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.deadline import LocalRate
from disagg.gateway.handoff.decoding import Answer, decoded
from disagg.gateway.handoff.losses import Losses
from disagg.gateway.replicas.choosing import Chooser, Reservation
from disagg.gateway.replicas.membership import POOLS, Membership
from disagg.observability.metrics import Metrics
from disagg.routing.candidates import NO_ROOM, OTHER_KV_FIT
from disagg.routing.constraints import alone
from disagg.routing.views import RequestView
from pools.errors import AttemptsExhaustedError, NoReplicaError, ReplicaLostError
from transport.errors import DisaggError

_UNKNOWN_PREFILL_S = 10.0
"""For how long a prompt counts as being computed when its answer is not streamed and no rate is known yet."""


class LocalPrefill:
    """Sends requests to one replica alone. One per gateway replica."""

    def __init__(
        self,
        *,
        config: GatewayConfig,
        membership: Membership,
        chooser: Chooser,
        metrics: Metrics,
        rate: LocalRate,
    ) -> None:
        self._config = config
        self._membership = membership
        self._chooser = chooser
        self._metrics = metrics
        self._rate = rate
        metrics.on_render(self._show)

    async def answer(
        self, call: Call, request: RequestView, losses: Losses, *, first: Reservation | None = None
    ) -> Answer:
        """Send the request as it came to one replica after the other, until one answers without a 5xx.

        When no further replica can be tried, returns the last 5xx answer if there was one. Otherwise raises
        NoReplicaError, RateLimitError or AttemptsExhaustedError.

        Args:
            request: rules out all modes but `local` and `prefill`, and says why there is no hand-off.
            losses: the replicas that the request lost before. `answer` adds those that it loses.
            first: a reservation for the first try, if the caller has made one already.
        """
        reason = request.ruled_out["handoff"]
        failed: Answer | None = None
        while True:
            if losses.count >= self._config.max_attempts:
                if failed is not None:
                    return failed
                raise AttemptsExhaustedError(
                    f"the request was lost on {losses.count} replicas, and no more are tried for it "
                    "(gateway.max_attempts)"
                )
            with first or self._chooser.reserve(request) as reservation:
                first = None
                if reservation.decision.refusal is not None:
                    if failed is not None:
                        return failed
                    raise self._refused(reservation.decision.refusal)
                member = reservation.answering
                try:
                    answer = await self._computed(reservation, call, request.num_tokens)
                except ReplicaLostError as exc:
                    self._membership.mark_lost(member, exc)
                    losses.add(member.info.replica_id, had_it=exc.sent)
                else:
                    if answer.status < 400:
                        # A request that the engine refuses was computed by nobody.
                        self._metrics.local_prefill(reason)
                    if answer.status < 500:
                        return answer
                    failed = answer
                    losses.add(member.info.replica_id)
            self._metrics.retries.labels("decode").inc()
            request = alone(request, reason, (member.info.replica_id,))

    def _refused(self, refusal: str) -> DisaggError:
        if refusal != NO_ROOM:
            return no_replica(refusal)
        self._metrics.local_prefills_refused.inc()
        return RateLimitError(
            "every replica that could answer computes as many prompt tokens as it may for this gateway "
            f"({self._config.local_prefill_tokens}, gateway.local_prefill_tokens)"
        )

    async def _computed(self, reservation: Reservation, call: Call, num_tokens: int) -> Answer:
        """Send the request as it came to the reserved replica. Raises ReplicaLostError."""
        call.progress.at_decode()
        now = asyncio.get_running_loop().time
        began = now()
        seat = reservation.take_answering()
        if not call.body.get("stream"):
            seat.expect_prompt_within(self._rate.expected_s(num_tokens) or _UNKNOWN_PREFILL_S)
        cached = call.reached.cached(seat.member)
        try:
            answer = await decoded(seat, call, call.raw, mode=reservation.decision.mode, prefill_id="local")
        finally:
            seat.prompt_computed()
        answer.cached = cached
        if answer.exchange is not None:
            # Only a stream shows when its first token came.
            self._rate.measured(num_tokens, now() - began)
        return answer

    def _show(self) -> None:
        self._metrics.local_prefill_tokens.clear()
        for member in (member for pool in POOLS for member in self._membership.members(pool)):
            self._metrics.local_prefill_tokens.labels(member.info.replica_id).set(member.local_prefill_tokens)


def no_replica(refusal: str) -> NoReplicaError:
    """The error for a decision that no replica serves the request. `refusal` is the decision's word for why."""
    if refusal == OTHER_KV_FIT:
        return NoReplicaError("every replica that is ready has another model or other engine arguments")
    return NoReplicaError("no replica is ready")
