# SPDX-License-Identifier: Apache-2.0
"""Requests without a hand-off: sent as they came, their prompts computed by decode replicas that have room for them.

How much room there is is decided in `local_budget`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import NoReturn

from disagg.config import GatewayConfig
from disagg.errors import RateLimitError
from disagg.gateway.handoff.deadline import LocalRate
from disagg.gateway.handoff.local_budget import computing, has_room, num_prompt_tokens
from disagg.gateway.handoff.losses import Losses
from disagg.gateway.handoff.sending import Answer, Call, Sender
from disagg.gateway.replicas.membership import DECODE, Member, Membership
from disagg.observability.metrics import Metrics
from pools.errors import AttemptsExhaustedError, NoReplicaError, ReplicaLostError

_UNKNOWN_PREFILL_S = 10.0
"""How long a prompt is taken to be computed whose answer does not show when that is over, while no rate is known."""


class LocalPrefill:
    """Sends requests to decode replicas alone. One per gateway replica."""

    def __init__(
        self,
        *,
        config: GatewayConfig,
        membership: Membership,
        metrics: Metrics,
        sender: Sender,
        rate: LocalRate,
        max_model_len: int | None,
    ) -> None:
        self._config = config
        self._membership = membership
        self._metrics = metrics
        self._sender = sender
        self._rate = rate
        self._max_model_len = max_model_len
        metrics.on_render(self._show)

    async def answer(
        self,
        call: Call,
        reason: str,
        losses: Losses,
        without: Collection[str] = (),
        *,
        refuse: bool = True,
    ) -> Answer:
        """The request as it came, on each decode replica in turn until one answers without a fault of its own.

        Raises NoReplicaError, RateLimitError and AttemptsExhaustedError.

        Args:
            losses: of what was tried before; those of this are added.
            without: decode replicas not to be tried.
            refuse: whether it is refused when no replica has room for its prompt.
        """
        tried = set(without)
        num_tokens = num_prompt_tokens(call.prompts, call.raw, max_model_len=self._max_model_len)
        failed: Answer | None = None
        self._metrics.local_prefill(reason)
        while True:
            may_try = losses.count < self._config.max_attempts
            member = self._roomy(num_tokens, tried, refuse=refuse) if may_try else None
            if member is None:
                if failed is not None:
                    return failed
                self._give_up(tried, losses.count)
            try:
                answer = await self._computed(member, call, num_tokens)
            except ReplicaLostError as exc:
                self._sender.lost(member, exc)
                losses.lost(member.info.replica_id, had_it=exc.sent)
            else:
                if answer.status < 500:
                    return answer
                failed = answer
                losses.lost(member.info.replica_id)
            self._metrics.retries.labels("decode").inc()
            tried.add(member.info.replica_id)

    def _roomy(self, num_tokens: int, tried: set[str], *, refuse: bool) -> Member | None:
        """The decode replica to compute a prompt, among those that have room for it."""
        limit = self._config.local_prefill_tokens
        return self._membership.pick_decode(
            without=tried, fits=lambda member: not refuse or has_room(member, num_tokens, limit=limit)
        )

    def _give_up(self, tried: set[str], num_lost: int) -> NoReturn:
        if num_lost >= self._config.max_attempts:
            raise AttemptsExhaustedError(
                f"the request was lost on {num_lost} decode replicas, and no more are tried for it "
                "(gateway.max_attempts)"
            )
        if not self._membership.has_decode(without=tried):
            raise NoReplicaError("no decode replica is ready")
        self._metrics.local_prefills_refused.inc()
        raise RateLimitError(
            "every decode replica computes as many prompt tokens as it may for this gateway "
            f"({self._config.local_prefill_tokens}, gateway.local_prefill_tokens)"
        )

    async def _computed(self, member: Member, call: Call, num_tokens: int) -> Answer:
        """The request as it came, its prompt computed by `member`. Raises ReplicaLostError."""
        call.progress.at_decode()
        now = asyncio.get_running_loop().time
        began = now()
        at_most_s = None
        if not call.body.get("stream"):
            at_most_s = self._rate.expected_s(num_tokens) or _UNKNOWN_PREFILL_S
        with computing(member, num_tokens, at_most_s=at_most_s):
            answer = await self._sender.decode(member, call, call.raw, mode="local", prefill_id="local")
        if answer.exchange is not None:
            # An answer that is not streamed has no first token.
            self._rate.measured(num_tokens, now() - began)
        return answer

    def _show(self) -> None:
        self._metrics.local_prefill_tokens.clear()
        for member in self._membership.members(DECODE):
            self._metrics.local_prefill_tokens.labels(member.info.replica_id).set(member.local_prefill_tokens)
