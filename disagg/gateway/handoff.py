# SPDX-License-Identifier: Apache-2.0
"""The two legs of one request: prefill on one replica, the answer from another, and what happens when one is lost.

Deciding is in `legs` and `membership`, the order of the legs in the transfer, giving back in `settling`; this is the
shell that tries and falls back.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from disagg.config import GatewayConfig
from disagg.gateway.background import Background
from disagg.gateway.legs import PrefillReply, Route, decode_body, offer_params, prefill_body, route_for
from disagg.gateway.membership import Member, Membership, Pair
from disagg.gateway.metrics import Metrics
from disagg.gateway.sending import Answer, Call, Sender, is_server_fault, spawn_kept
from disagg.gateway.settling import CLEANUP_TIMEOUT_S, Ledger, NoLedger, Settling, UnderWay
from disagg.gateway.transfer import Attempt, PrefillFailed, Transfer
from disagg.gateway.transfer_pull import Pull
from disagg.gateway.wire import Upstreams
from pools.errors import NoReplicaError, ReplicaLostError

__all__ = ["Answer", "Call", "Handoff", "is_server_fault"]

T = TypeVar("T")


class Handoff:
    """Runs requests over the two pools. One per gateway replica."""

    def __init__(
        self,
        *,
        model_id: str,
        config: GatewayConfig,
        membership: Membership,
        upstreams: Upstreams,
        metrics: Metrics,
        background: Background,
        transfer: Transfer | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._model_id = model_id
        self._config = config
        self._membership = membership
        self._metrics = metrics
        self._background = background
        self._transfer: Transfer = transfer or Pull()
        self._sender = Sender(membership, upstreams, metrics)
        self._settling = Settling(upstreams, background, ledger or NoLedger())
        self._leg_ids = itertools.count(1)
        self._incarnation = uuid.uuid4().hex[:12]

    async def answer(self, call: Call) -> Answer:
        """Run the request up to the first bytes of its answer.

        Cancelling it stops both legs and gives unused KV back. Raises NoReplicaError when nobody can serve.
        """
        route = route_for(call.endpoint, call.body, call.prompts, min_handoff_tokens=self._config.min_handoff_tokens)
        if route.mode == "handoff":
            return await self._handed_off(call)
        if route.mode == "primed":
            return await self._primed(call, route)
        return await self._local(call, route.reason)

    def settle(self, handoff_id: str) -> None:
        """Take a decode engine's word that it read nothing of a hand-off, and will not. Returns at once."""
        self._settling.settle(handoff_id)

    # Modes

    async def _handed_off(self, call: Call) -> Answer:
        assert call.prompts is not None
        prompt = call.prompts[0]

        async def take(under_way: UnderWay, params: dict[str, Any]) -> Answer | Member:
            """The answer, or the decode replica that was lost."""
            pair = under_way.pair
            body = decode_body(call.endpoint, call.body, prompt, params)
            try:
                answer = await self._sender.decode(
                    pair.decode,
                    call,
                    body,
                    mode="handoff",
                    prefill_id=pair.prefill.info.replica_id,
                    handoff_id=under_way.handoff_id,
                    on_sent=under_way.mark_taken,
                )
            except ReplicaLostError as exc:
                self._sender.lost(pair.decode, exc)
                self._settling.decode_lost(under_way, exc)
                return pair.decode
            self._settling.decode_answered(under_way, answer.status)
            return answer

        answer = await self._tried(call, prompt, take, drop=_close)
        if isinstance(answer, str):
            return await self._local(call, answer)
        if isinstance(answer, Member):
            self._metrics.retries.labels("decode").inc()
            return await self._local(call, "decode_lost", without={answer.info.replica_id})
        if answer.status >= 500:
            answer.close()
            return await self._local(call, "decode_error")
        return answer

    async def _primed(self, call: Call, route: Route) -> Answer:
        """Pull each prompt's KV into one decode engine's prefix cache, then send the request there as it is."""
        assert call.prompts is not None
        pair = self._membership.pick_pair()
        if pair is None:
            return await self._local(call, "no_warm_pair")
        async with asyncio.TaskGroup() as group:
            # The first prompt goes to the chosen pair, the others where there is room for them.
            primed = [
                group.create_task(self._prime(call, ids, pair.decode, None if i else pair))
                for i, ids in enumerate(call.prompts)
            ]
        outcomes = [task.result() for task in primed]
        prefills = [outcome for outcome in outcomes if isinstance(outcome, Member)]
        if not prefills:
            return await self._local(call, str(outcomes[0]))
        try:
            return await self._sender.decode(
                pair.decode, call, call.raw, mode="primed", prefill_id=prefills[0].info.replica_id
            )
        except ReplicaLostError as exc:
            self._sender.lost(pair.decode, exc)
            self._metrics.retries.labels("decode").inc()
            return await self._local(call, "decode_lost", without={pair.decode.info.replica_id})

    async def _prime(self, call: Call, prompt: Sequence[int], decode: Member, pair: Pair | None) -> Member | str:
        """Make `decode` pull one prompt's KV. A failure there costs a recomputation and nothing else.

        Returns the prefill replica that computed it, or why none did.
        """

        async def take(under_way: UnderWay, params: dict[str, Any]) -> Member:
            try:
                status, _ = await self._sender.probe(
                    decode,
                    prompt,
                    params,
                    timeout_s=self._config.prefill_timeout_s,
                    on_sent=under_way.mark_taken,
                )
            except ReplicaLostError as exc:
                self._sender.lost(decode, exc)
                self._settling.decode_lost(under_way, exc)
            else:
                self._settling.decode_answered(under_way, status)
            return under_way.pair.prefill

        return await self._tried(call, prompt, take, decode=decode, first=pair)

    async def _local(self, call: Call, reason: str, without: set[str] | None = None) -> Answer:
        """The request as it came, on each decode replica in turn until one answers without a fault of its own."""
        tried = set(without or ())
        failed: Answer | None = None
        self._metrics.local_prefill(reason)
        while True:
            member = self._membership.pick_decode(without=tried)
            if member is None:
                if failed is not None:
                    return failed
                raise NoReplicaError("no decode replica is ready")
            try:
                answer = await self._sender.decode(member, call, call.raw, mode="local", prefill_id="local")
            except ReplicaLostError as exc:
                self._sender.lost(member, exc)
            else:
                if answer.status < 500:
                    return answer
                failed = answer
            self._metrics.retries.labels("decode").inc()
            tried.add(member.info.replica_id)

    # One hand-off

    async def _tried(
        self,
        call: Call,
        prompt: Sequence[int],
        take: Callable[[UnderWay, dict[str, Any]], Awaitable[T]],
        *,
        decode: Member | None = None,
        first: Pair | None = None,
        drop: Callable[[T], None] = lambda _: None,
    ) -> T | str:
        """What `take` makes of one prompt's hand-off, or the reason why no prefill replica offered one.

        Args:
            take: sends the decode leg; a failure of its own is its to handle.
            decode: the decode replica, when that is settled.
            first: the pair to try first.
            drop: ends what `take` returned when nobody takes it any more.
        """
        tried: set[str] = set()
        deadline = asyncio.get_running_loop().time() + self._config.prefill_timeout_s
        while True:
            pair = first or self._membership.pick_pair(without=tried, decode=decode)
            first = None
            if pair is None:
                return "prefill_lost" if tried else "no_warm_pair"
            under_way = self._begin(call, pair, len(prompt))
            try:
                result = await self._transfer.run(self._attempt(call, prompt, under_way, take, drop), deadline=deadline)
            except asyncio.CancelledError:
                self._metrics.disconnects.labels("decode" if under_way.leg_done else "prefill").inc()
                self._settling.client_left(under_way)
                raise
            except PrefillFailed as exc:
                self._settling.prefill_failed(under_way, exc.__cause__)
                if isinstance(exc.__cause__, ReplicaLostError):
                    self._sender.lost(pair.prefill, exc.__cause__)
                if not exc.retry:
                    return exc.reason
            else:
                if not under_way.leg_done:
                    self._background.spawn(self._stop_outlived(under_way))
                return result
            finally:
                under_way.reserved.close()
            self._metrics.retries.labels("prefill").inc()
            tried.add(pair.prefill.info.replica_id)

    async def _stop_outlived(self, under_way: UnderWay) -> None:
        if await self._settling.outlived(under_way):
            self._metrics.local_prefill("decode_did_not_wait")

    def _begin(self, call: Call, pair: Pair, num_tokens: int) -> UnderWay:
        handoff_id = f"{self._incarnation}-{next(self._leg_ids)}"
        under_way = self._settling.begin(handoff_id, pair, call.request_id, num_tokens)
        under_way.reserved.enter_context(self._sender.carried(pair.decode))
        return under_way

    def _attempt(
        self,
        call: Call,
        prompt: Sequence[int],
        under_way: UnderWay,
        take: Callable[[UnderWay, dict[str, Any]], Awaitable[T]],
        drop: Callable[[T], None],
    ) -> Attempt[T]:
        handoff_id, prefill = under_way.handoff_id, under_way.pair.prefill
        params = self._transfer.prefill_params(offer_params(handoff_id, call.store), handoff_id)
        body = prefill_body(self._model_id, prompt, params, cache_salt=call.body.get("cache_salt"))

        def send() -> asyncio.Task[PrefillReply]:
            timeout_s = self._config.prefill_timeout_s + CLEANUP_TIMEOUT_S
            leg = self._background.spawn(self._sender.prefill(prefill, handoff_id, body, timeout_s=timeout_s))
            spawn_kept(leg)
            under_way.leg = leg
            return leg

        def taken(params: dict[str, Any]) -> Awaitable[T]:
            under_way.reserved.close()
            return take(under_way, params)

        return Attempt(handoff_id, prefill, send, taken, drop)


def _close(answer: Answer | Member) -> None:
    if isinstance(answer, Answer):
        answer.close()
