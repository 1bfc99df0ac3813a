# SPDX-License-Identifier: Apache-2.0
"""The prefill side of a request: which pairs are tried for one prompt, how long, and what ends it.

Which pair is the policy's to say. How long is decided in `deadline`, the race of two attempts in `hedging`, the order
of the legs in the transfer, giving back in `settling`.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar

from disagg.config import GatewayConfig
from disagg.gateway.background import Background
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.deadline import LocalRate, attempt_until, prefill_allowance_s
from disagg.gateway.handoff.hedging import Race, Runner
from disagg.gateway.handoff.legs import prefill_body
from disagg.gateway.handoff.pair_faults import PairFaults
from disagg.gateway.handoff.settling import Settling, UnderWay
from disagg.gateway.handoff.transfer import Attempt, PrefillFailed, Transfer
from disagg.gateway.replicas.choosing import Chooser
from disagg.gateway.replicas.membership import Membership
from disagg.gateway.replicas.reservation import Reservation
from disagg.observability.metrics import Metrics
from disagg.routing.candidates import NO_WARM_PAIR
from disagg.routing.constraints import pair_only
from disagg.routing.views import RequestView
from pools.client.messages import PrefillReply
from pools.client.replica import CLEANUP_TIMEOUT_S
from pools.errors import ReplicaLostError
from transport.handoff_params import offer_params

T = TypeVar("T")
Take: TypeAlias = Callable[[UnderWay, Reservation, dict[str, Any]], Awaitable[T]]


@dataclass
class Prompt(Generic[T]):
    """One prompt to be handed off, and what has been tried for it."""

    call: Call
    request: RequestView
    """Without the prefill replicas that failed."""
    token_ids: Sequence[int]
    take: Take[T]
    """Sends the decode leg, which takes its hold over; a failure of its own is its to handle."""
    drop: Callable[[T], None] = lambda _: None
    """Ends what `take` returned when nobody takes it any more."""
    deadline: float = 0.0
    """Loop time by which the prefill side is over."""


class Prefilling:
    """Gets prompts computed by prefill replicas. One per gateway replica."""

    def __init__(
        self,
        *,
        model_id: str,
        config: GatewayConfig,
        chooser: Chooser,
        metrics: Metrics,
        background: Background,
        transfer: Transfer,
        membership: Membership,
        settling: Settling,
        faults: PairFaults,
        local_rate: LocalRate,
    ) -> None:
        self._model_id = model_id
        self._config = config
        self._chooser = chooser
        self._metrics = metrics
        self._background = background
        self._transfer = transfer
        self._membership = membership
        self._settling = settling
        self._faults = faults
        self._local_rate = local_rate
        self._leg_ids = itertools.count(1)
        self._incarnation = uuid.uuid4().hex[:12]

    async def tried(self, prompt: Prompt[T], *, first: Reservation | None = None) -> T | str:
        """What `take` makes of the prompt's hand-off, or the reason why no prefill replica offered one.

        Args:
            first: the pair to try first, where that is decided already.
        """
        now = asyncio.get_running_loop().time
        prompt.deadline = now() + prefill_allowance_s(
            len(prompt.token_ids),
            prefill_timeout_s=self._config.prefill_timeout_s,
            first_token_target_s=self._config.first_token_target_s,
            local_tokens_per_s=self._local_rate.tokens_per_s,
        )
        reason = NO_WARM_PAIR
        while True:
            reservation = first or self._other(prompt)
            first = None
            if reservation.pair is None:
                return reason
            until = self._until(prompt, reservation)
            try:
                if self._config.hedge_after_s is None:
                    return await self._attempted(prompt, reservation, until)
                return await self._hedged(prompt, reservation, until, self._config.hedge_after_s)
            except PrefillFailed as exc:
                reason = exc.reason
                if not exc.retry or (until >= prompt.deadline and reason == "prefill_timeout"):
                    return reason
                if now() >= prompt.deadline:
                    return "prefill_timeout"
            self._metrics.retries.labels("prefill").inc()

    def _other(self, prompt: Prompt[T], without: tuple[str, ...] = ()) -> Reservation:
        """A pair for the prompt, its decode replica the same where that is settled."""
        return self._chooser.reserve(pair_only(prompt.request, without))

    def _until(self, prompt: Prompt[T], reservation: Reservation) -> float:
        """When an attempt with this pair ends."""
        another = reservation.decision.has_other_prefill(decode_id=prompt.request.decode_id)
        return attempt_until(asyncio.get_running_loop().time(), prompt.deadline, another=another)

    async def _hedged(self, prompt: Prompt[T], first: Reservation, until: float, after_s: float) -> T:
        """As `_attempted`, with a second pair when the first is slow."""
        race: Race[T] = Race(prompt.drop)
        other: Reservation | None = None

        def attempt(reservation: Reservation, until: float) -> Callable[[Runner], Coroutine[Any, Any, T]]:
            return lambda runner: self._attempted(prompt, reservation, until, race, runner)

        def second() -> Callable[[Runner], Coroutine[Any, Any, T]] | None:
            nonlocal other
            assert first.pair is not None
            other = self._other(prompt, (first.pair.prefill.info.replica_id,))
            # Each is tried for what is left of the whole: there is nothing to keep back for a retry.
            return None if other.pair is None else attempt(other, prompt.deadline)

        try:
            result, outcome = await race.run(attempt(first, until), second, after_s=after_s)
        finally:
            # An attempt that is cancelled before it begins releases nothing itself.
            for reservation in (first, other):
                if reservation is not None:
                    reservation.release()
        if outcome is not None:
            self._metrics.hedges.labels(outcome).inc()
        return result

    async def _attempted(
        self,
        prompt: Prompt[T],
        reservation: Reservation,
        until: float,
        race: Race[T] | None = None,
        runner: Runner | None = None,
    ) -> T:
        """One hand-off. Raises PrefillFailed; its prefill replica is left out of `prompt.request` then."""
        pair = reservation.pair
        assert pair is not None
        handoff_id = f"{self._incarnation}-{next(self._leg_ids)}"
        call = prompt.call
        under_way = self._settling.begin(handoff_id, pair, call.request_id, len(prompt.token_ids), call.tenant)

        def claim() -> None:
            if race is not None and runner is not None:
                race.claim(runner)

        try:
            result = await self._transfer.run(self._attempt(prompt, under_way, reservation, claim), deadline=until)
        except asyncio.CancelledError:
            self._faults.over(under_way)
            if runner is not None and runner.beaten:
                self._settling.prefill_failed(under_way, TimeoutError())
            else:
                if under_way.leg_done:
                    prompt.call.progress.at_decode()
                self._settling.client_left(under_way)
            raise
        except PrefillFailed as exc:
            self._faults.over(under_way)
            self._settling.prefill_failed(under_way, exc.__cause__)
            if isinstance(exc.__cause__, ReplicaLostError):
                self._membership.lost(pair.prefill, exc.__cause__)
            without = prompt.request.without | {pair.prefill.info.replica_id}
            prompt.request = replace(prompt.request, without=without)
            raise
        else:
            if not under_way.leg_done:
                self._background.spawn(self._stop_outlived(under_way))
            return result
        finally:
            reservation.release()

    async def _stop_outlived(self, under_way: UnderWay) -> None:
        if await self._settling.outlived(under_way):
            self._faults.over(under_way)
            self._metrics.local_prefill("decode_did_not_wait")

    def _attempt(
        self, prompt: Prompt[T], under_way: UnderWay, reservation: Reservation, claim: Callable[[], None]
    ) -> Attempt[T]:
        handoff_id, prefill = under_way.handoff_id, under_way.pair.prefill
        params = self._transfer.prefill_params(offer_params(handoff_id, prompt.call.store), handoff_id)
        salt = prompt.call.body.get("cache_salt")
        body = prefill_body(self._model_id, prompt.token_ids, params, cache_salt=salt)

        def send() -> asyncio.Task[PrefillReply]:
            timeout_s = self._config.prefill_timeout_s + CLEANUP_TIMEOUT_S
            hold = reservation.take_prefill()
            leg = self._background.spawn_kept(
                prefill.client.prefill(body, leg_id=handoff_id, trace=prompt.call.trace, timeout_s=timeout_s)
            )
            leg.add_done_callback(lambda _: hold.release())
            leg.add_done_callback(lambda _: self._faults.begin(under_way))
            under_way.leg = leg
            return leg

        def taken(params: dict[str, Any]) -> Awaitable[T]:
            claim()
            return prompt.take(under_way, reservation, params)

        return Attempt(handoff_id, prefill, send, taken, prompt.drop)
