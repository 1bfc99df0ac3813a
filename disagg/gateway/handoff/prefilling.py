# SPDX-License-Identifier: Apache-2.0
"""The prefill side of a request: which pairs are tried for one prompt, for how long, and what ends an attempt.

`deadline` decides for how long, `hedging` runs the race of two attempts, the transfer orders the legs, and `settling`
gives KV back.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from disagg.config import GatewayConfig
from disagg.gateway.background import Background
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.deadline import LocalRate, attempt_until, prefill_allowance_s
from disagg.gateway.handoff.hedging import Race, Runner
from disagg.gateway.handoff.pair_faults import PairFaults
from disagg.gateway.handoff.settling import Settling, UnderWay
from disagg.gateway.handoff.transfer import PrefillFailed, PrefillLeg, Transfer
from disagg.gateway.replicas.choosing import Chooser, Reservation
from disagg.gateway.replicas.membership import Member, Membership, Pair
from disagg.observability.metrics import Metrics
from disagg.routing.candidates import NO_WARM_PAIR
from disagg.routing.constraints import pair_only
from disagg.routing.views import RequestView
from pools.client.messages import prefill_body
from pools.client.replica import CLEANUP_TIMEOUT_S
from pools.errors import ReplicaLostError
from transport.handoff_params import offer_params

T = TypeVar("T")
Params = dict[str, Any]
Take = Callable[[UnderWay, Params], Coroutine[Any, Any, T]]
"""Sends a hand-off's decode leg with these `kv_transfer_params`. `Prefilling` does not handle what it raises."""


class NotOffered(Exception):
    """No prefill replica computed the prompt.

    Attributes:
        reason: why, in one of a few fixed words that are metric labels.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Tries:
    """One prompt to be handed off, and what has been tried for it."""

    call: Call
    request: RequestView
    """Rules out the prefill replicas that failed for this prompt."""
    token_ids: Sequence[int]
    deadline: float
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

    async def handed_off(
        self,
        call: Call,
        request: RequestView,
        token_ids: Sequence[int],
        take: Take[T],
        *,
        drop: Callable[[T], None] = lambda _: None,
        first: Reservation | None = None,
    ) -> T:
        """Hand the prompt off, and return what `take` returns. Raises NotOffered when no prefill replica computed it.

        Args:
            request: says what is ruled out for the prompt, and names the decode replica where that is fixed.
            drop: ends a result of `take` that no caller will get.
            first: a reservation of the pair to try first; None lets the policy choose.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + prefill_allowance_s(
            len(token_ids),
            prefill_timeout_s=self._config.prefill_timeout_s,
            first_token_target_s=self._config.first_token_target_s,
            local_tokens_per_s=self._local_rate.tokens_per_s,
        )
        tries = Tries(call, request, token_ids, deadline)
        reason = NO_WARM_PAIR
        reservation = first or self._other(tries)
        while reservation.pair is not None:
            until = self._until(tries, reservation)
            try:
                under_way, params = await self._offered(tries, reservation, until)
                return await self._finished(tries, under_way, take(under_way, params), drop)
            except PrefillFailed as exc:
                reason = exc.reason
                if not exc.retry or (until >= deadline and reason == "prefill_timeout"):
                    break
                if now() >= deadline:
                    reason = "prefill_timeout"
                    break
            self._metrics.retries.labels("prefill").inc()
            reservation = self._other(tries)
        raise NotOffered(reason)

    def _other(self, tries: Tries, *, beside: Pair | None = None) -> Reservation:
        """Reserve a pair for the prompt. Where the request fixes the decode replica, the pair has that one.

        Args:
            beside: a pair whose prefill replica is ruled out, too.
        """
        return self._chooser.reserve(
            pair_only(tries.request, () if beside is None else (beside.prefill.info.replica_id,))
        )

    def _until(self, tries: Tries, reservation: Reservation) -> float:
        """Loop time at which an attempt with this pair must end."""
        another = reservation.decision.has_other_prefill(decode_id=tries.request.decode_id)
        return attempt_until(asyncio.get_running_loop().time(), tries.deadline, another=another)

    async def _offered(self, tries: Tries, first: Reservation, until: float) -> tuple[UnderWay, Params]:
        """A hand-off whose decode leg may be sent, and the `kv_transfer_params` of that leg.

        When the first pair is slow, a second pair is tried beside it. Raises PrefillFailed.
        """
        after_s = self._config.hedge_after_s
        if after_s is None:
            return await self._begun(tries, first, until)
        race: Race[tuple[UnderWay, Params]] = Race(lambda begun: self._give_up(begun[0], TimeoutError()))
        other: Reservation | None = None

        def attempt(
            reservation: Reservation, until: float
        ) -> Callable[[Runner], Coroutine[Any, Any, tuple[UnderWay, Params]]]:
            return lambda runner: self._begun(tries, reservation, until, race, runner)

        def second() -> Callable[[Runner], Coroutine[Any, Any, tuple[UnderWay, Params]]] | None:
            nonlocal other
            other = self._other(tries, beside=first.pair)
            # The second attempt may use all the time that is left: it keeps nothing back for a retry.
            return None if other.pair is None else attempt(other, tries.deadline)

        begun: tuple[UnderWay, Params] | None = None
        try:
            begun, outcome = await race.run(attempt(first, until), second, after_s=after_s)
        finally:
            # An attempt whose task is cancelled before its first step does not release its reservation itself.
            for reservation in (first, other):
                if reservation is not None and (begun is None or begun[0].reservation is not reservation):
                    reservation.release()
        if outcome is not None:
            self._metrics.hedges.labels(outcome).inc()
        return begun

    async def _begun(
        self,
        tries: Tries,
        reservation: Reservation,
        until: float,
        race: Race[tuple[UnderWay, Params]] | None = None,
        runner: Runner | None = None,
    ) -> tuple[UnderWay, Params]:
        """Run one hand-off up to the point where its decode leg may be sent. Raises PrefillFailed."""
        assert reservation.pair is not None
        try:
            under_way = self._send(tries, reservation, until)
        except BaseException as exc:
            reservation.release()
            if isinstance(exc, PrefillFailed):
                self._failed(tries, reservation.pair.prefill, exc)
            raise
        try:
            params = await self._transfer.params(under_way.leg, deadline=until)
        except asyncio.CancelledError:
            if runner is not None and runner.beaten:
                self._give_up(under_way, TimeoutError())
            else:
                self._left(tries, under_way)
            raise
        except PrefillFailed as exc:
            self._give_up(under_way, exc.__cause__)
            self._failed(tries, under_way.pair.prefill, exc)
            raise
        except BaseException:
            self._broke(under_way)
            raise
        if race is not None and runner is not None:
            race.claim(runner)
        return under_way, params

    async def _finished(
        self, tries: Tries, under_way: UnderWay, decode: Coroutine[Any, Any, T], drop: Callable[[T], None]
    ) -> T:
        """Run the decode leg and return its result. Raises PrefillFailed."""
        try:
            result = await self._transfer.finish(under_way.leg, decode, drop=drop, deadline=under_way.until)
        except asyncio.CancelledError:
            self._left(tries, under_way)
            raise
        except PrefillFailed as exc:
            self._give_up(under_way, exc.__cause__)
            self._failed(tries, under_way.pair.prefill, exc)
            raise
        except BaseException:
            self._broke(under_way)
            raise
        finally:
            under_way.reservation.release()
        if not under_way.leg_done:
            self._background.spawn(self._stop_outlived(under_way))
        return result

    def _send(self, tries: Tries, reservation: Reservation, until: float) -> UnderWay:
        """Send the prefill leg. Raises PrefillFailed when the replica cannot be sent one."""
        pair = reservation.pair
        assert pair is not None
        handoff_id = f"{self._incarnation}-{next(self._leg_ids)}"
        call = tries.call
        params = self._transfer.prefill_params(offer_params(handoff_id, call.store), handoff_id, pair.prefill)
        body = prefill_body(self._model_id, tries.token_ids, params, asked=call.body)
        self._settling.expect(handoff_id, pair, call.request_id, len(tries.token_ids), call.tenant)
        timeout_s = self._config.prefill_timeout_s + CLEANUP_TIMEOUT_S
        seat = reservation.take_prefill()
        task = self._background.spawn_kept(
            pair.prefill.client.prefill(body, leg_id=handoff_id, trace=call.trace, timeout_s=timeout_s)
        )
        task.add_done_callback(seat.leg_over)
        leg = PrefillLeg(handoff_id, pair.prefill, task)
        call.reached.prefill(leg)
        under_way = UnderWay(pair, leg, until, reservation)
        task.add_done_callback(functools.partial(self._faults.begin, under_way))
        return under_way

    def _give_up(self, under_way: UnderWay, cause: BaseException | None) -> None:
        """Give up a hand-off whose prefill side failed or was too slow. `cause` is None when the engine answered."""
        under_way.reservation.release()
        self._faults.over(under_way)
        self._settling.prefill_failed(under_way, cause)

    def _failed(self, tries: Tries, prefill: Member, error: PrefillFailed) -> None:
        """A prefill replica failed: it is not tried again for this prompt."""
        if isinstance(error.__cause__, ReplicaLostError):
            self._membership.mark_lost(prefill, error.__cause__)
        without = tries.request.without | {prefill.info.replica_id}
        tries.request = replace(tries.request, without=without)

    def _left(self, tries: Tries, under_way: UnderWay) -> None:
        """The client went away."""
        under_way.reservation.release()
        self._faults.over(under_way)
        if under_way.leg_done:
            tries.call.progress.at_decode()
        self._settling.client_left(under_way)

    def _broke(self, under_way: UnderWay) -> None:
        """An exception that is no part of the plan ends a hand-off, unless whoever raised it has done so already."""
        under_way.reservation.release()
        if not under_way.given_up:
            self._faults.over(under_way)
            self._settling.gateway_failed(under_way)

    async def _stop_outlived(self, under_way: UnderWay) -> None:
        if await self._settling.outlived(under_way):
            self._faults.over(under_way)
            self._metrics.local_prefill("decode_did_not_wait")
