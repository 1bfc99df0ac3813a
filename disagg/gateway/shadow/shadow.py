# SPDX-License-Identifier: Apache-2.0
"""Corruption watch: computes one of N answers again that were made with moved KV, without that KV, and compares.

A check runs in the background once the client has the answer, on the decode replica that gave it. Weights and kernels
are the same, so only the origin of the prompt's KV differs. `rules` says what is checked and how answers are compared,
`kv_paths` what follows from the result.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from disagg.config import GatewayConfig
from disagg.gateway.background import Background
from disagg.gateway.front.in_flight import InFlight
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.decoding import Answer
from disagg.gateway.handoff.pair_faults import end_rest_later
from disagg.gateway.handoff.settling import UnderWay
from disagg.gateway.handoff.token_ids import IDS, asking_for_ids, without_ids
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.replicas.choosing import Chooser, Seat
from disagg.gateway.replicas.kv_paths import KvPaths
from disagg.gateway.replicas.membership import DECODE, PREFILL, Membership, Pair
from disagg.gateway.shadow.rules import Computed, Difference, computed, difference, may_check, shadow_body
from disagg.observability.metrics import Metrics
from disagg.routing.constraints import errand
from pools.errors import ReplicaLostError

logger = logging.getLogger(__name__)

_BUSY_SHARE = 0.25
"""Share of the requests that the gateway may carry. While it carries more than that, it checks nothing."""
_TIMEOUT_S = 120.0
_CONSUMED_TIMEOUT_S = 5.0
"""How long the gateway waits for the engines' event that the KV was read."""
_POLL_S = 0.05


class Sent(Protocol):
    """What a client was sent of a stream. The attributes are valid after `parse`."""

    token_ids: array[int]
    done: bool
    refusal: str | None
    fault: bytes | None

    def parse(self) -> None: ...


class CheckFailed(Exception):
    """A second run that gave nothing to compare with; the message says why."""


class Shadow:
    """One gateway replica's checks, at most one at a time. Belongs to the gateway's loop."""

    def __init__(
        self,
        every: int,
        *,
        model_id: str,
        config: GatewayConfig,
        membership: Membership,
        chooser: Chooser,
        metrics: Metrics,
        background: Background,
        paths: KvPaths,
        ledger: Ledger,
        in_flight: InFlight,
    ) -> None:
        self._every = every
        self._model_id = model_id
        self._config = config
        self._membership = membership
        self._chooser = chooser
        self._metrics = metrics
        self._background = background
        self._paths = paths
        self._ledger = ledger
        self._in_flight = in_flight
        self._num_since = 0
        self._running = False

    def begin(self, call: Call) -> Check | None:
        """The check of a request that is about to be sent; None when it cannot be checked. Send the check's `call`."""
        if not may_check(call.body, call.prompts):
            return None
        if call.body.get("stream") or not (self._num_since + 1 >= self._every or self._paths.any_suspect):
            return Check(call, self)
        # An answer that is not streamed has token ids only if the request asks for them, so decide before it is sent.
        return Check(asking_for_ids(call), self, asked=True, hide=call.body.get(IDS) is not True)

    def over(self, check: Check, answer: Answer, sent: Sent | None) -> None:
        """A client has a whole answer: begin its check in the background if it is due. Returns at once."""
        under_way = answer.under_way
        if under_way is None or answer.status != 200:
            return
        self._num_since += 1
        due = self._num_since >= self._every
        if not (due or self._paths.is_suspect(under_way.pair.key)):
            return
        answered = check.token_ids(answer, sent)[: self._config.shadow_max_tokens]
        if not answered:
            # A later answer is checked in its place.
            return
        if due:
            self._num_since = 0
        if self._running or self._in_flight.num > self._config.max_num_requests * _BUSY_SHARE:
            self._metrics.shadow_checks.labels("skipped").inc()
            return
        self._running = True
        self._background.forever(self._run(check.call, under_way, answered))

    async def _run(self, call: Call, under_way: UnderWay, answered: Sequence[int]) -> None:
        try:
            again = await self._computed(call, under_way, len(answered))
            if again is None:
                self._metrics.shadow_checks.labels("skipped").inc()
            else:
                self._judge(call, under_way, difference(answered, again), again)
        except CheckFailed as exc:
            self._metrics.shadow_checks.labels("failed").inc()
            logger.warning("the answer to request %s could not be checked: %s", call.request_id, exc)
        finally:
            self._running = False

    async def _computed(self, call: Call, under_way: UnderWay, num_tokens: int) -> Computed | None:
        """The second run; None when there is no point in it or no room for it. Raises CheckFailed."""
        assert call.prompts is not None
        prompt, member = call.prompts[0], under_way.pair.decode
        if not await self._consumed(under_way.leg.handoff_id):
            # The decode engine computed the KV or had it cached, so the answer proves nothing of the pair.
            return None
        request = errand(num_tokens=len(prompt), decode_id=member.info.replica_id)
        if not self._membership.is_listed(member) or self._chooser.decide(request).refusal is not None:
            return None
        salt = f"shadow-{uuid.uuid4().hex}"
        body = shadow_body(self._model_id, prompt, num_tokens, asked=call.body, cache_salt=salt)
        leg_id = f"shadow-{uuid.uuid4().hex}"
        try:
            with Seat(member, len(prompt)):
                answer = await member.client.check(body, leg_id=leg_id, timeout_s=_TIMEOUT_S)
        except ReplicaLostError as exc:
            raise CheckFailed(str(exc)) from exc
        again = computed(answer.payload) if answer.status == 200 else None
        if again is None:
            raise CheckFailed(f"{member.info.replica_id} answered {answer.status}: {answer.payload[:200]!r}")
        return again

    async def _consumed(self, handoff_id: str) -> bool:
        """Whether the decode engine has read a hand-off, as the engines tell."""
        deadline = asyncio.get_running_loop().time() + _CONSUMED_TIMEOUT_S
        while (record := self._ledger.find(handoff_id)) is not None and record.outcome == "open":
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return record is not None and record.outcome == "consumed"

    def _judge(self, call: Call, under_way: UnderWay, found: Difference | None, again: Computed) -> None:
        pair = under_way.pair
        if found is None:
            self._metrics.shadow_checks.labels("same").inc()
            self._paths.same(pair.key)
            return
        self._metrics.shadow_checks.labels("tie" if found.is_tie else "different").inc()
        logger.log(
            logging.INFO if found.is_tie else logging.ERROR,
            "token %d of the answer to request %s is %d with KV from %s on %s, and %d computed there alone%s; hand-off "
            "%s; best tokens of the second run in nats: %s",
            found.position,
            call.request_id,
            found.answered,
            pair.prefill.info.replica_id,
            pair.decode.info.replica_id,
            found.computed,
            ", a near tie" if found.is_tie else "",
            under_way.leg.handoff_id,
            dict(found.top_logprobs) or "not told",
        )
        if found.is_tie:
            return
        rest_s = self._paths.different(pair.key)
        if rest_s is not None and self._membership.is_listed(pair.prefill) and self._membership.is_listed(pair.decode):
            self._take_out(pair, rest_s)

    def _take_out(self, pair: Pair, rest_s: float) -> None:
        logger.error(
            "KV from %s to %s is not used for %g s: one answer after the other came out different without it",
            pair.prefill.info.replica_id,
            pair.decode.info.replica_id,
            rest_s,
        )
        self._membership.mark_cold(pair, rest_s=rest_s)
        self._background.forever(end_rest_later(self._membership, pair))


@dataclass
class Check:
    """One request whose answer may be checked."""

    call: Call
    """The request as it has to be sent."""
    _shadow: Shadow
    asked: bool = False
    """Whether the gateway asked for the token ids of an answer that is not streamed."""
    hide: bool = False
    """Whether the gateway has to hide these ids, because the client did not ask for them."""
    _token_ids: Sequence[int] = field(default=(), init=False)

    def taken(self, answer: Answer) -> bytes:
        """What the client gets of an answer that is not streamed. Keeps the token ids that the gateway asked for."""
        if not self.asked or answer.status != 200:
            return answer.content
        document = computed(answer.content)
        self._token_ids = document.token_ids if document is not None else ()
        return without_ids(answer.content) if self.hide else answer.content

    def over(self, answer: Answer, sent: Sent | None) -> None:
        """The client has the whole answer. Returns at once.

        Args:
            sent: what the client was sent of a stream; None without a stream, and for a stream without token ids.
        """
        self._shadow.over(self, answer, sent)

    def token_ids(self, answer: Answer, sent: Sent | None) -> Sequence[int]:
        """Ids of the tokens that the client got; empty when they are not known, or not all from one replica."""
        if sent is None or answer.exchange is None or not answer.exchange.complete:
            return self._token_ids
        sent.parse()
        whole = sent.done and sent.refusal is None and sent.fault is None
        return sent.token_ids.tolist() if whole else ()


def show_paths(paths: KvPaths, membership: Membership, metrics: Metrics) -> None:
    """Set the gauge of each pair with a proof, one that succeeded or one that failed."""
    metrics.kv_path_verified.clear()
    for pair in (Pair(p, d) for p in membership.members(PREFILL) for d in membership.members(DECODE)):
        verified = paths.verified(pair.key)
        if verified is not None:
            prefill_id, decode_id = pair.prefill.info.replica_id, pair.decode.info.replica_id
            metrics.kv_path_verified.labels(prefill_id, decode_id).set(int(verified))
