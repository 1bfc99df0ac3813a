# SPDX-License-Identifier: Apache-2.0
"""The two legs of one request: prefill on one replica, the answer from another, and what happens when one is lost.

The routing policy decides, the transfer orders the legs, and `settling` gives KV back. This module carries the
decisions out, and falls back to a local prefill when a hand-off fails.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from disagg.config import GatewayConfig
from disagg.gateway.background import Background
from disagg.gateway.front.fields import PATHS
from disagg.gateway.handoff.cached import Cached, had, of_each, told
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.deadline import LocalRate
from disagg.gateway.handoff.decoding import Answer, decoded
from disagg.gateway.handoff.local_prefill import LocalPrefill, no_replica
from disagg.gateway.handoff.losses import Losses
from disagg.gateway.handoff.pair_faults import PairFaults
from disagg.gateway.handoff.prefilling import NotOffered, Prefilling
from disagg.gateway.handoff.settling import Settling, UnderWay
from disagg.gateway.handoff.transfer import Transfer
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.replicas.choosing import Chooser, Reservation, Seat
from disagg.gateway.replicas.membership import Membership
from disagg.observability.metrics import Metrics
from disagg.routing.candidates import OTHER_KV_FIT
from disagg.routing.constraints import alone, resumed, view_of
from disagg.routing.views import RequestView
from pools.client.messages import decode_body
from pools.errors import ReplicaLostError, UnusableAnswerError


class DecodeLost(Exception):
    """A decode replica broke off before it had shown anything.

    Attributes:
        had_it: whether the request may have reached the replica.
    """

    def __init__(self, replica_id: str, *, had_it: bool) -> None:
        super().__init__(replica_id)
        self.replica_id = replica_id
        self.had_it = had_it


@dataclass(frozen=True)
class Primed:
    """A prompt whose KV the decode engine has read, or will compute itself."""

    replica_id: str
    """The prefill replica that computed it."""
    num_cached: int
    """Tokens of it that prefill or decode had cached."""


class Handoff:
    """Runs requests over the two pools. One per gateway replica."""

    def __init__(
        self,
        *,
        model_id: str,
        config: GatewayConfig,
        membership: Membership,
        chooser: Chooser,
        metrics: Metrics,
        background: Background,
        transfer: Transfer,
        ledger: Ledger,
        max_model_len: int | None,
    ) -> None:
        self._model_id = model_id
        self._config = config
        self._chooser = chooser
        self._max_model_len = max_model_len
        self._metrics = metrics
        self._membership = membership
        self._transfer = transfer
        self._settling = Settling(background, ledger)
        self._faults = PairFaults(membership, metrics, background)
        self._local_rate = LocalRate()
        self._local = LocalPrefill(
            config=config,
            membership=membership,
            chooser=chooser,
            metrics=metrics,
            rate=self._local_rate,
        )
        self._prefilling = Prefilling(
            model_id=model_id,
            config=config,
            chooser=chooser,
            metrics=metrics,
            background=background,
            transfer=transfer,
            membership=membership,
            settling=self._settling,
            faults=self._faults,
            local_rate=self._local_rate,
        )

    async def answer(self, call: Call, losses: Losses) -> Answer:
        """Run the request up to the first bytes of its answer.

        Cancelling it stops both legs and gives unused KV back. Raises NoReplicaError when nobody can serve.

        Args:
            losses: `answer` adds the decode replicas that this request loses.
        """
        request = self._view(call)
        with self._chooser.reserve(request) as reservation:
            decision = reservation.decision
            if decision.mode == "handoff":
                return await self._handed_off(call, losses, request, reservation)
            if decision.mode == "primed":
                return await self._primed(call, losses, request, reservation)
            return await self._local.answer(call, alone(request, decision.reason), losses, first=reservation)

    async def resume(self, call: Call, losses: Losses) -> Answer:
        """Resume a stream that the client has begun to read, on a replica that is not in `losses` while there is one.

        Raises what `answer` raises. The gateway does not refuse a resume for lack of room, because it has accepted the
        stream before. Replicas with another `kv_fit`, which exist during a rolling update, cannot resume the stream.

        Args:
            call: has one prompt, which ends with the tokens of the answer up to the cut.
            losses: the replicas that the stream and all earlier tries to resume it lost. `resume` adds those it loses.
        """
        request = self._chooser.sparing(resumed(self._view(call), losses.kv_fit), losses.replica_ids)
        with self._chooser.reserve(request) as reservation:
            decision = reservation.decision
            if decision.refusal == OTHER_KV_FIT:
                raise no_replica(decision.refusal)
            if decision.mode == "handoff":
                return await self._handed_off(call, losses, request, reservation)
            return await self._local.answer(call, alone(request, decision.reason), losses, first=reservation)

    def settle(self, handoff_id: str) -> None:
        """Take note that a decode engine has read nothing of a hand-off, and will not. Returns at once."""
        self._faults.unread(handoff_id)
        self._settling.settle(handoff_id)

    def _view(self, call: Call) -> RequestView:
        return view_of(
            call.endpoint,
            call.body,
            call.prompts,
            call.raw,
            min_handoff_tokens=self._config.min_handoff_tokens,
            max_model_len=self._max_model_len,
        )

    # Modes

    async def _handed_off(self, call: Call, losses: Losses, request: RequestView, first: Reservation) -> Answer:
        """Answer through a warm pair, the reserved one first. When no hand-off works out, answer by a local prefill."""
        assert call.prompts is not None
        decode = functools.partial(self._decoded, call)
        try:
            answer = await self._prefilling.handed_off(
                call, request, call.prompts[0], decode, drop=Answer.close, first=first
            )
        except NotOffered as exc:
            return await self._local.answer(call, alone(request, exc.reason), losses)
        except DecodeLost as exc:
            self._metrics.retries.labels("decode").inc()
            losses.add(exc.replica_id, had_it=exc.had_it)
            return await self._local.answer(call, alone(request, "decode_lost", (exc.replica_id,)), losses)
        if answer.status < 500:
            return answer
        found = await self._after_error(call, answer, losses, request)
        if found.status < 500 and answer.under_way is not None:
            self._faults.failed(answer.under_way)
        return found

    async def _decoded(self, call: Call, under_way: UnderWay, params: dict[str, Any]) -> Answer:
        """The decode leg of a hand-off, up to its first bytes. Raises DecodeLost."""
        assert call.prompts is not None
        pair = under_way.pair
        body = decode_body(PATHS[call.endpoint], call.body, call.prompts[0], params)
        prefill_id = pair.prefill.info.replica_id
        cached = call.reached.cached(pair.decode, under_way.leg, engine_tells=self._transfer.tells_cached)
        try:
            answer = await decoded(
                under_way.reservation.take_answering(),
                call,
                body,
                mode="handoff",
                prefill_id=prefill_id,
                under_way=under_way,
            )
        except ReplicaLostError as exc:
            self._lost(under_way, exc)
            raise DecodeLost(pair.decode.info.replica_id, had_it=exc.sent) from exc
        self._answered(under_way, answer.status)
        answer.cached = cached
        return answer

    def _lost(self, under_way: UnderWay, error: ReplicaLostError) -> None:
        """Handle that a decode replica broke off during a hand-off."""
        self._membership.mark_lost(under_way.pair.decode, error)
        self._settling.decode_lost(under_way, error)
        self._faults.decode_broke_off(under_way, error)

    def _answered(self, under_way: UnderWay, status: int) -> None:
        """Handle that a decode replica has answered its side of a hand-off with a status."""
        self._settling.decode_answered(under_way, status)
        self._faults.answered(under_way, status)

    async def _after_error(self, call: Call, answer: Answer, losses: Losses, request: RequestView) -> Answer:
        """Answer by a local prefill after a decode replica has answered 5xx, on another replica while there is one."""
        answer.close()
        losses.add(answer.decode_id)
        request = self._chooser.sparing(alone(request, "decode_error"), (answer.decode_id,))
        return await self._local.answer(call, request, losses)

    async def _primed(self, call: Call, losses: Losses, request: RequestView, first: Reservation) -> Answer:
        """Make one decode engine pull each prompt's KV into its prefix cache, then send the client's request there."""
        failed: list[UnderWay] = []
        answer = await self._after_priming(call, losses, request, first, failed)
        if answer.status < 500:
            for under_way in failed:
                self._faults.failed(under_way)
        return answer

    async def _after_priming(
        self, call: Call, losses: Losses, request: RequestView, first: Reservation, failed: list[UnderWay]
    ) -> Answer:
        """As `_primed`. Adds each hand-off to `failed` whose probe the decode replica answered with a 5xx."""
        assert call.prompts is not None
        decode = first.answering
        settled = replace(request, decode_id=decode.info.replica_id)
        async with asyncio.TaskGroup() as group:
            # The first prompt goes to the reserved pair. For each other one the policy chooses a prefill replica.
            primed = [
                group.create_task(self._primed_with(call, settled, ids, None if i else first, failed))
                for i, ids in enumerate(call.prompts)
            ]
        outcomes = [task.result() for task in primed]
        done = [outcome for outcome in outcomes if isinstance(outcome, Primed)]
        ids = [prompt for prompt, outcome in zip(call.prompts, outcomes, strict=True) if isinstance(outcome, Primed)]
        if not done:
            return await self._local.answer(call, alone(request, str(outcomes[0])), losses)
        call.progress.at_decode()
        found = of_each(ids, [one.num_cached for one in done], block_size=decode.info.block_size)
        call.reached.settle(sum(found))
        try:
            answer = await decoded(Seat(decode), call, call.raw, mode="primed", prefill_id=done[0].replica_id)
        except ReplicaLostError as exc:
            self._membership.mark_lost(decode, exc)
            self._metrics.retries.labels("decode").inc()
            losses.add(decode.info.replica_id, had_it=exc.sent)
            return await self._local.answer(call, alone(request, "decode_lost", losses.replica_ids), losses)
        if answer.status >= 500:
            return await self._after_error(call, answer, losses, request)
        answer.cached = Cached(sum(found))
        return answer

    async def _primed_with(
        self,
        call: Call,
        request: RequestView,
        prompt: Sequence[int],
        first: Reservation | None,
        failed: list[UnderWay],
    ) -> Primed | NotOffered:
        """Make the chosen decode replica pull one prompt's KV. After a failure it only has to compute the prompt."""
        probe = functools.partial(self._probed, call, prompt, failed)
        try:
            return await self._prefilling.handed_off(call, request, prompt, probe, first=first)
        except NotOffered as exc:
            return exc

    async def _probed(
        self,
        call: Call,
        prompt: Sequence[int],
        failed: list[UnderWay],
        under_way: UnderWay,
        params: dict[str, Any],
    ) -> Primed:
        """Send the probe of a hand-off that only primes. Adds the hand-off to `failed` when the replica answers 5xx."""
        prefill_id = under_way.pair.prefill.info.replica_id
        try:
            with under_way.reservation.take_answering() as seat:
                probed = await seat.member.client.probe(
                    prompt,
                    params,
                    trace=call.trace,
                    timeout_s=self._config.prefill_timeout_s,
                    on_sent=under_way.mark_taken,
                    asked=call.body,
                )
        except ReplicaLostError as exc:
            self._lost(under_way, exc)
            return Primed(prefill_id, had(under_way.leg.task))
        except UnusableAnswerError as exc:
            status, num_cached = exc.status, had(under_way.leg.task)
        else:
            status, num_cached = 200, max(await told(under_way.leg.task), probed.num_cached_before)
        self._answered(under_way, status)
        if status >= 500:
            failed.append(under_way)
        return Primed(prefill_id, num_cached)
