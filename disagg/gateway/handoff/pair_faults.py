# SPDX-License-Identifier: Apache-2.0
"""Which failures of a hand-off are its pair's fault, and what an open breaker means for the pair.

The counting is in `disagg.gateway.handoff.breaker`. A failure that one replica alone explains is not counted here: a
prefill leg that failed, a replica that cannot be reached, a hand-off that somebody gave up.
"""

from __future__ import annotations

import asyncio
import logging

from disagg.gateway.background import Background
from disagg.gateway.handoff.breaker import THRESHOLD, Opened, PairBreaker
from disagg.gateway.handoff.settling import UnderWay
from disagg.gateway.replicas.membership import DECODE, PREFILL, Membership, Pair
from disagg.observability.metrics import Metrics
from pools.client.messages import PrefillReply
from pools.errors import ReplicaLostError, UnusableAnswerError

logger = logging.getLogger(__name__)


class PairFaults:
    """Tells the breaker what became of hand-offs, and takes pairs out of routing. Belongs to the gateway's loop."""

    def __init__(self, membership: Membership, metrics: Metrics, background: Background) -> None:
        self._membership = membership
        self._metrics = metrics
        self._background = background
        self._breaker = PairBreaker()

    def begin(self, under_way: UnderWay, leg: asyncio.Task[PrefillReply] | None = None) -> None:
        """Let a hand-off count for its pair from now on: its prefill leg is over.

        What the decode engine reported of the hand-off before that says nothing about the pair.

        Args:
            leg: the task of the prefill leg, because this is a callback of that task. Not used.
        """
        if not under_way.given_up:
            self._breaker.begin(under_way.leg.handoff_id, under_way.pair)

    def over(self, under_way: UnderWay) -> None:
        """A hand-off was given up: an engine may report it as `unread`, and the pair is not to blame."""
        self._breaker.over(under_way.leg.handoff_id)

    def answered(self, under_way: UnderWay, status: int) -> None:
        """The decode replica answered with a status. A 4xx is the client's fault, and a 5xx may be; see `failed`."""
        if status >= 400:
            self._breaker.over(under_way.leg.handoff_id)
        else:
            self._breaker.succeeded(under_way.leg.handoff_id)

    def failed(self, under_way: UnderWay) -> None:
        """The decode replica answered the hand-off with a 5xx, but the same request got no 5xx without the hand-off."""
        self._breaker.begin(under_way.leg.handoff_id, under_way.pair)
        self._failed(under_way.leg.handoff_id)

    def decode_broke_off(self, under_way: UnderWay, error: ReplicaLostError) -> None:
        """The decode leg broke off. That is the pair's fault if the decode replica still answers. Returns at once."""
        self._breaker.over(under_way.leg.handoff_id)
        if error.sent:
            self._background.spawn(self._blame(under_way.leg.handoff_id, under_way.pair))

    def unread(self, handoff_id: str) -> None:
        """A decode engine says that it has not read a hand-off, and will not.

        The pair is to blame unless its prefill replica is gone.
        """
        pair = self._breaker.pair_of(handoff_id)
        if pair is not None and not (pair.prefill.usable and self._membership.is_listed(pair.prefill)):
            self._breaker.over(handoff_id)
            return
        self._failed(handoff_id)

    async def _blame(self, handoff_id: str, pair: Pair) -> None:
        try:
            await pair.decode.client.stats()
        except (ReplicaLostError, UnusableAnswerError):
            # The decode replica is lost, so the pair is not to blame. The code that sent the leg has handled the loss.
            return
        if pair.decode.usable:
            self._breaker.begin(handoff_id, pair)
            self._failed(handoff_id)

    def _failed(self, handoff_id: str) -> None:
        pair = self._breaker.pair_of(handoff_id)
        if pair is not None and self._membership.is_resting(pair):
            # This hand-off was under way when its pair was taken out of routing.
            self._breaker.over(handoff_id)
            return
        opened = self._breaker.failed(handoff_id)
        if opened is not None:
            self._open(opened)

    def _open(self, opened: Opened) -> None:
        pair = opened.pair
        self._metrics.breaker_opened.inc()
        if opened.first:
            logger.warning(
                "%d hand-offs in a row from %s to %s failed while both work; the pair is not used until KV has moved "
                "again. Later times are only counted in disagg_pair_breaker_opened_total",
                THRESHOLD,
                pair.prefill.info.replica_id,
                pair.decode.info.replica_id,
            )
        self._membership.mark_cold(pair, rest_s=opened.rest_s)
        self._background.forever(end_rest_later(self._membership, pair))
        members = self._membership.members
        self._breaker.retain({Pair(p, d).key for p in members(PREFILL) for d in members(DECODE)})


async def end_rest_later(membership: Membership, pair: Pair) -> None:
    """Let a pair that was marked cold be warmed again when its rest is over."""
    while (left := membership.end_rest(pair)) > 0:
        await asyncio.sleep(left)
