# SPDX-License-Identifier: Apache-2.0
"""The two legs of one request: prefill on one replica, the answer from another, and what happens when one is lost.

Deciding is in `legs` and `membership`, the order of the legs in the transfer, giving back in `settling`; this is the
shell that tries and falls back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from disagg.config import GatewayConfig
from disagg.errors import RateLimitError
from disagg.gateway.background import Background
from disagg.gateway.legs import Route, decode_body, is_server_fault, route_for
from disagg.gateway.local_budget import computing, has_room, num_prompt_tokens
from disagg.gateway.membership import DECODE, Member, Membership, Pair
from disagg.gateway.metrics import Metrics
from disagg.gateway.pair_faults import PairFaults
from disagg.gateway.prefill_deadline import LocalRate
from disagg.gateway.prefilling import Prefilling, Prompt
from disagg.gateway.sending import Answer, Call, Sender
from disagg.gateway.settling import Ledger, NoLedger, Settling, UnderWay
from disagg.gateway.transfer import Transfer
from disagg.gateway.transfer_pull import Pull
from disagg.gateway.wire import Upstreams
from pools.errors import AttemptsExhaustedError, NoReplicaError, ReplicaLostError

__all__ = ["Answer", "Call", "Handoff", "is_server_fault"]


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
        self._sender = Sender(membership, upstreams, metrics)
        self._settling = Settling(upstreams, background, ledger or NoLedger())
        self._faults = PairFaults(membership, upstreams, metrics, background)
        self._local_rate = LocalRate()
        self._prefilling = Prefilling(
            model_id=model_id,
            config=config,
            membership=membership,
            metrics=metrics,
            background=background,
            transfer=transfer or Pull(),
            sender=self._sender,
            settling=self._settling,
            faults=self._faults,
            local_rate=self._local_rate,
        )
        metrics.on_render(self._show_local_prefills)

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

    async def resume(self, call: Call, *, without: Collection[str], num_lost: int) -> Answer:
        """Go on with a stream that was begun, at another replica than those in `without` while there is one.

        Raises what `answer` raises, but is not refused for lack of room: its stream has begun.

        Args:
            call: one prompt, which ends with the tokens that were sent.
            num_lost: how many replicas it was lost on.
        """
        if self._membership.pick_decode(without=without) is None:
            without = ()
        route = route_for(call.endpoint, call.body, call.prompts, min_handoff_tokens=self._config.min_handoff_tokens)
        if route.mode == "handoff" and self._membership.has_pair(without=without):
            return await self._handed_off(call, without, num_lost=num_lost, refuse=False)
        reason = route.reason or "no_warm_pair"
        return await self._local(call, reason, without, num_lost=num_lost, refuse=False)

    def settle(self, handoff_id: str) -> None:
        """Take a decode engine's word that it read nothing of a hand-off, and will not. Returns at once."""
        self._faults.unread(handoff_id)
        self._settling.settle(handoff_id)

    # Modes

    async def _handed_off(
        self, call: Call, without: Collection[str] = (), *, num_lost: int = 0, refuse: bool = True
    ) -> Answer:
        """Through a warm pair, else locally. `without`, `num_lost` and `refuse` are those of `_local`."""
        assert call.prompts is not None
        prompt = call.prompts[0]

        async def take(under_way: UnderWay, params: dict[str, Any]) -> Answer | _Lost:
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
                self._faults.lost(under_way, exc)
                return _Lost(pair.decode, exc.sent)
            self._settling.decode_answered(under_way, answer.status)
            self._faults.answered(under_way, answer.status)
            answer.under_way = under_way
            return answer

        answer = await self._prefilling.tried(Prompt(call, prompt, take, _close, without=set(without)))
        if isinstance(answer, str):
            return await self._local(call, answer, without, num_lost=num_lost, refuse=refuse)
        if isinstance(answer, _Lost):
            self._metrics.retries.labels("decode").inc()
            lost = {*without, answer.member.info.replica_id}
            return await self._local(call, "decode_lost", lost, num_lost=num_lost + answer.sent, refuse=refuse)
        if answer.status >= 500:
            answer.close()
            return await self._local(call, "decode_error", without, num_lost=num_lost + 1, refuse=refuse)
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
            return await self._local(call, "decode_lost", {pair.decode.info.replica_id}, num_lost=int(exc.sent))

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
                    cache_salt=call.body.get("cache_salt"),
                )
            except ReplicaLostError as exc:
                self._sender.lost(decode, exc)
                self._settling.decode_lost(under_way, exc)
                self._faults.lost(under_way, exc)
            else:
                self._settling.decode_answered(under_way, status)
                self._faults.answered(under_way, status)
            return under_way.pair.prefill

        return await self._prefilling.tried(Prompt(call, prompt, take, decode=decode), first=pair)

    async def _local(
        self, call: Call, reason: str, without: Collection[str] = (), *, num_lost: int = 0, refuse: bool = True
    ) -> Answer:
        """The request as it came, on each decode replica in turn until one answers without a fault of its own.

        Raises NoReplicaError, RateLimitError and AttemptsExhaustedError.

        Args:
            without: decode replicas that were lost with this request.
            num_lost: how many of the replicas tried so far may have had it.
            refuse: whether it is refused when no replica has room for its prompt.
        """
        tried = set(without)
        num_tokens = num_prompt_tokens(call.prompts, call.raw)
        failed: Answer | None = None
        self._metrics.local_prefill(reason)
        while True:
            member = self._roomy(num_tokens, tried, refuse=refuse) if num_lost < self._config.max_attempts else None
            if member is None:
                if failed is not None:
                    return failed
                self._give_up(tried, num_lost)
            try:
                answer = await self._computed(member, call, num_tokens)
            except ReplicaLostError as exc:
                self._sender.lost(member, exc)
                num_lost += exc.sent
            else:
                if answer.status < 500:
                    return answer
                failed = answer
                num_lost += 1
            self._metrics.retries.labels("decode").inc()
            tried.add(member.info.replica_id)

    def _roomy(self, num_tokens: int, tried: set[str], *, refuse: bool) -> Member | None:
        """The decode replica to compute a prompt, among those that have room for it."""
        if not refuse:
            return self._membership.pick_decode(without=tried)
        limit = self._config.local_prefill_tokens
        members = self._membership.members(DECODE)
        full = {m.info.replica_id for m in members if not has_room(m, num_tokens, limit=limit)}
        return self._membership.pick_decode(without=tried | full)

    def _give_up(self, tried: set[str], num_lost: int) -> NoReturn:
        if num_lost >= self._config.max_attempts:
            raise AttemptsExhaustedError(
                f"the request was lost on {num_lost} decode replicas, and no more are tried for it "
                "(gateway.max_attempts)"
            )
        if self._membership.pick_decode(without=tried) is None:
            raise NoReplicaError("no decode replica is ready")
        self._metrics.local_prefills_refused.inc()
        raise RateLimitError(
            "every decode replica computes as many prompt tokens as it may for this gateway "
            f"({self._config.local_prefill_tokens}, gateway.local_prefill_tokens)"
        )

    async def _computed(self, member: Member, call: Call, num_tokens: int) -> Answer:
        """The request as it came, its prompt computed by `member`. Raises ReplicaLostError."""
        now = asyncio.get_running_loop().time
        began = now()
        with computing(member, num_tokens):
            answer = await self._sender.decode(member, call, call.raw, mode="local", prefill_id="local")
        if answer.exchange is not None:
            # An answer that is not streamed has no first token.
            self._local_rate.measured(num_tokens, now() - began)
        return answer

    def _show_local_prefills(self) -> None:
        self._metrics.local_prefill_tokens.clear()
        for member in self._membership.members(DECODE):
            self._metrics.local_prefill_tokens.labels(member.info.replica_id).set(member.local_prefill_tokens)


def _close(answer: Answer | _Lost) -> None:
    if isinstance(answer, Answer):
        answer.close()
