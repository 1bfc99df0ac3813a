# SPDX-License-Identifier: Apache-2.0
"""The two legs of one request: prefill on one replica, the answer from another, and what happens when one is lost.

Deciding is the routing policy's, the order of the legs the transfer's, giving back `settling`'s; this is the shell that
carries decisions out and falls back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from disagg.config import GatewayConfig
from disagg.gateway.background import Background
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.deadline import LocalRate
from disagg.gateway.handoff.decoding import Answer, decoded
from disagg.gateway.handoff.legs import decode_body
from disagg.gateway.handoff.local_prefill import LocalPrefill, no_replica
from disagg.gateway.handoff.losses import Losses
from disagg.gateway.handoff.pair_faults import PairFaults
from disagg.gateway.handoff.prefilling import Prefilling, Prompt
from disagg.gateway.handoff.settling import Ledger, NoLedger, Settling, UnderWay
from disagg.gateway.handoff.transfer import Transfer
from disagg.gateway.replicas.choosing import Chooser
from disagg.gateway.replicas.membership import Member, Membership
from disagg.gateway.replicas.reservation import Hold, Reservation
from disagg.observability.metrics import Metrics
from disagg.routing.candidates import OTHER_KV_FIT
from disagg.routing.constraints import alone, resumed, view_of
from disagg.routing.views import RequestView
from pools.errors import ReplicaLostError, UnusableAnswerError


@dataclass(frozen=True)
class _Lost:
    """A decode replica that broke off before it had shown anything."""

    member: Member
    sent: bool
    """Whether it may have had the request."""


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
        ledger: Ledger | None = None,
        max_model_len: int | None = None,
    ) -> None:
        self._model_id = model_id
        self._config = config
        self._chooser = chooser
        self._max_model_len = max_model_len
        self._metrics = metrics
        self._membership = membership
        self._settling = Settling(background, ledger or NoLedger())
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
            losses: takes the decode replicas that are lost on the way.
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
        """Go on with a stream that was begun, at another replica than those in `losses` while there is one.

        Raises what `answer` raises, but is not refused for lack of room: its stream has begun. Replicas of another
        `kv_fit`, as there are during a rolling update, do not go on with it.

        Args:
            call: one prompt, which ends with the tokens that were sent.
            losses: of its stream and of all earlier tries to go on; those of this one are added.
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
        """Take a decode engine's word that it read nothing of a hand-off, and will not. Returns at once."""
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
        """Through a warm pair, the one that is reserved to begin with, else locally."""
        assert call.prompts is not None
        prompt = call.prompts[0]

        async def take(under_way: UnderWay, reserved: Reservation, params: dict[str, Any]) -> Answer | _Lost:
            """The answer, or the decode replica that was lost."""
            pair = under_way.pair
            body = decode_body(call.endpoint, call.body, prompt, params)
            try:
                answer = await decoded(
                    reserved.take_decode(),
                    call,
                    body,
                    mode="handoff",
                    prefill_id=pair.prefill.info.replica_id,
                    handoff_id=under_way.handoff_id,
                    on_sent=under_way.mark_taken,
                )
            except ReplicaLostError as exc:
                self._membership.lost(pair.decode, exc)
                self._settling.decode_lost(under_way, exc)
                self._faults.lost(under_way, exc)
                return _Lost(pair.decode, exc.sent)
            self._settling.decode_answered(under_way, answer.status)
            self._faults.answered(under_way, answer.status)
            answer.under_way = under_way
            return answer

        answer = await self._prefilling.tried(Prompt(call, request, prompt, take, _close), first=first)
        if isinstance(answer, str):
            return await self._local.answer(call, alone(request, answer), losses)
        if isinstance(answer, _Lost):
            self._metrics.retries.labels("decode").inc()
            lost_id = answer.member.info.replica_id
            losses.lost(lost_id, had_it=answer.sent)
            return await self._local.answer(call, alone(request, "decode_lost", (lost_id,)), losses)
        if answer.status < 500:
            return answer
        found = await self._after_error(call, answer, losses, request)
        if found.status < 500 and answer.under_way is not None:
            self._faults.failed(answer.under_way)
        return found

    async def _after_error(self, call: Call, answer: Answer, losses: Losses, request: RequestView) -> Answer:
        """Locally after a decode replica has answered 5xx, at another one while there is one."""
        answer.close()
        losses.lost(answer.decode_id)
        request = self._chooser.sparing(alone(request, "decode_error"), (answer.decode_id,))
        return await self._local.answer(call, request, losses)

    async def _primed(self, call: Call, losses: Losses, request: RequestView, first: Reservation) -> Answer:
        """Pull each prompt's KV into one decode engine's prefix cache, then send the request there as it is."""
        failed: list[UnderWay] = []
        answer = await self._after_priming(call, losses, request, first, failed)
        if answer.status < 500:
            for under_way in failed:
                self._faults.failed(under_way)
        return answer

    async def _after_priming(
        self, call: Call, losses: Losses, request: RequestView, first: Reservation, failed: list[UnderWay]
    ) -> Answer:
        """As `_primed`. Adds the hand-offs that decode answered 5xx to `failed`."""
        assert call.prompts is not None
        decode = first.decode
        settled = replace(request, decode_id=decode.info.replica_id)
        async with asyncio.TaskGroup() as group:
            # The first prompt goes to the chosen pair, the others where there is room for them.
            primed = [
                group.create_task(self._prime(call, settled, ids, None if i else first, failed))
                for i, ids in enumerate(call.prompts)
            ]
        outcomes = [task.result() for task in primed]
        prefills = [outcome for outcome in outcomes if isinstance(outcome, Member)]
        if not prefills:
            return await self._local.answer(call, alone(request, str(outcomes[0])), losses)
        call.progress.at_decode()
        try:
            answer = await decoded(Hold(decode), call, call.raw, mode="primed", prefill_id=prefills[0].info.replica_id)
        except ReplicaLostError as exc:
            self._membership.lost(decode, exc)
            self._metrics.retries.labels("decode").inc()
            losses.lost(decode.info.replica_id, had_it=exc.sent)
            return await self._local.answer(call, alone(request, "decode_lost", losses.replica_ids), losses)
        return answer if answer.status < 500 else await self._after_error(call, answer, losses, request)

    async def _prime(
        self,
        call: Call,
        request: RequestView,
        prompt: Sequence[int],
        first: Reservation | None,
        failed: list[UnderWay],
    ) -> Member | str:
        """Make the settled decode replica pull one prompt's KV. A failure there costs a recomputation, nothing else.

        Returns the prefill replica that computed it, or why none did.
        """

        async def take(under_way: UnderWay, reserved: Reservation, params: dict[str, Any]) -> Member:
            decode = under_way.pair.decode
            try:
                with reserved.take_decode():
                    await decode.client.probe(
                        prompt,
                        params,
                        trace=call.trace,
                        timeout_s=self._config.prefill_timeout_s,
                        on_sent=under_way.mark_taken,
                        cache_salt=call.body.get("cache_salt"),
                    )
            except ReplicaLostError as exc:
                self._membership.lost(decode, exc)
                self._settling.decode_lost(under_way, exc)
                self._faults.lost(under_way, exc)
                return under_way.pair.prefill
            except UnusableAnswerError as exc:
                status = exc.status
            else:
                status = 200
            self._settling.decode_answered(under_way, status)
            self._faults.answered(under_way, status)
            if status >= 500:
                failed.append(under_way)
            return under_way.pair.prefill

        return await self._prefilling.tried(Prompt(call, request, prompt, take), first=first)


def _close(answer: Answer | _Lost) -> None:
    if isinstance(answer, Answer):
        answer.close()
