# SPDX-License-Identifier: Apache-2.0
"""Reads every replica's events into the ledger, and its statistics into the metrics.

One task reads one replica, over its own connection: a long poll of `/disagg/v1/events`, and `/disagg/v1/stats` every
few seconds. Only the end of the replica ends its task. When Serve has taken a replica out of its list, the task reads
on until nothing listens at the replica's address, because a draining replica still gives out KV. If such a replica is
merely late, the task reads on for minutes. When a replica comes back, its old events are not read again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import FIFOCache

from disagg.gateway.background import Background
from disagg.gateway.backoff import Backoff
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.replicas.membership import POOLS, Membership
from disagg.observability.metrics import Metrics
from disagg.routing.views import ReplicaInfo
from pools.client.events import Happened, TierDegraded, Unread
from pools.client.replica import ReplicaClient
from pools.errors import ReplicaLostError, UnusableAnswerError

logger = logging.getLogger(__name__)

OnUnread = Callable[[str], None]
"""Called with the id of a hand-off of this gateway that its decode engine will not read. Must not block."""

_WAIT_S = 20.0
_STATS_S = 5.0
_STATS_TIMEOUT_S = 5.0
_PACE_S = 0.05
"""Least time between two polls that brought something: events of a busy engine come in batches."""
_FIRST_RETRY_S = 0.1
_MAX_RETRY_S = 5.0
_SILENT_S = 600.0
"""How long a replica that is out of Serve's list may say nothing, e.g. because its node is gone."""
_MAX_REMEMBERED = 1024
"""Incarnations that are not followed any more and may come back."""


@dataclass
class _Followed:
    info: ReplicaInfo
    task: asyncio.Task[None] | None = None
    leaving: bool = False
    """Serve has taken the replica out of its list."""
    draining: bool = False
    """The replica says so itself. Serve's list is no proof: it is empty for a moment after a controller restart."""
    after: int = 0
    """Number of the last event read."""
    stats_at: float = 0.0
    """When its statistics are due, on the loop's clock."""
    heard_at: float = 0.0
    """When its events were last read, or its task began, on the loop's clock."""


class LedgerFeed:
    """Follows the members of both pools. Belongs to the gateway's loop."""

    def __init__(
        self,
        ledger: Ledger,
        membership: Membership,
        metrics: Metrics,
        background: Background,
        on_unread: OnUnread,
        *,
        connect_timeout_s: float,
        foreign: Ledger | None = None,
        reader: str = "",
        carrying: Callable[[], bool] = lambda: False,
        wait_s: float = _WAIT_S,
        stats_s: float = _STATS_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start with nobody to follow.

        Args:
            foreign: books of other gateways' hand-offs; unset keeps none.
            reader: this gateway's name, by which a leaving replica waits for it. No replica waits for an empty name.
            carrying: whether the gateway has requests that may need a replica that leaves.
            wait_s: longest that one poll waits for events.
            stats_s: seconds between two looks at statistics.
            clock: unix seconds. Tiers that degraded before this call are not counted.
        """
        self._ledger = ledger
        self._foreign = foreign or Ledger(num_records=1, owns=lambda _: False)
        self._membership = membership
        self._metrics = metrics
        self._background = background
        self._on_unread = on_unread
        self._connect_timeout_s = connect_timeout_s
        self._reader = reader
        self._carrying = carrying
        self._wait_s = wait_s
        self._stats_s = stats_s
        self._started_at = clock()
        self._followed: dict[str, _Followed] = {}
        # Incarnation to the number of the last event read, of those that are not followed any more.
        self._read: FIFOCache[str, int] = FIFOCache(_MAX_REMEMBERED)

    def members_changed(self) -> None:
        """Begin to follow every replica that is not followed yet. Returns at once."""
        members = {m.info.incarnation: m.info for pool in POOLS for m in self._membership.members(pool)}
        for incarnation, info in members.items():
            if incarnation not in self._followed:
                followed = self._followed[incarnation] = _Followed(info, after=self._read.pop(incarnation, 0))
                followed.task = self._background.forever(self._follow(followed))
        for incarnation, followed in self._followed.items():
            followed.leaving = incarnation not in members
        self._metrics.engines.retain({info.replica_id for info in members.values()})

    async def sweep(self) -> None:
        """Run forever: let the ledgers write off records that lost events have left open."""
        while True:
            await asyncio.sleep(self._stats_s)
            self._ledger.sweep()
            self._foreign.sweep()

    async def _follow(self, followed: _Followed) -> None:
        info = followed.info
        client = ReplicaClient(info.url, key=info.secret, connect_timeout_s=self._connect_timeout_s, observer=None)
        loop = asyncio.get_running_loop()
        backoff = Backoff(_FIRST_RETRY_S, _MAX_RETRY_S)
        followed.heard_at = loop.time()
        try:
            while True:
                try:
                    found = await self._poll(client, followed)
                    backoff.reset()
                    followed.heard_at = loop.time()
                    if found:
                        await asyncio.sleep(_PACE_S)
                    continue
                except (ReplicaLostError, UnusableAnswerError, _ReplacedError) as exc:
                    problem: Exception = exc
                    logger.debug("no events from %s: %s", followed.info.replica_id, exc)
                except Exception as exc:
                    problem = exc
                    logger.exception("events of %s could not be taken over", followed.info.replica_id)
                if followed.leaving and (_is_gone(problem) or loop.time() - followed.heard_at > _SILENT_S):
                    return
                self._metrics.ledger_feed_errors.inc()
                await asyncio.sleep(backoff.next_s())
        finally:
            client.close()
            self._followed.pop(followed.info.incarnation, None)
            self._read[followed.info.incarnation] = followed.after
            self._ledger.replica_gone(followed.info.incarnation)
            self._foreign.replica_gone(followed.info.incarnation)
            self._membership.forget(followed.info.incarnation)

    async def _poll(self, client: ReplicaClient, followed: _Followed) -> bool:
        """One round: read statistics when they are due, then events. Returns whether there were events."""
        now = asyncio.get_running_loop().time()
        if now >= followed.stats_at:
            followed.stats_at = now + self._stats_s
            await self._read_stats(client, followed)
        # The poll must end when the next statistics are due.
        wait_s = min(self._wait_s, self._stats_s)
        batch = await client.events(followed.after, wait_s=wait_s, reader=self._reader, done=self._is_done(followed))
        if batch.incarnation != followed.info.incarnation:
            raise _ReplacedError("another engine answers at its address")
        if batch.lost:
            # Events that were lost before the first read are from before this gateway knew the replica.
            if followed.after:
                self._metrics.ledger_events_lost.inc(batch.lost)
                logger.warning("%d events of %s are lost", batch.lost, followed.info.replica_id)
            self._ledger.gap(followed.info.incarnation)
            self._foreign.gap(followed.info.incarnation)
        followed.after = batch.next
        followed.draining = batch.draining
        self._ledger.malformed(batch.num_malformed)
        for event in batch.events:
            self._take(followed.info, event)
        return bool(batch.events)

    def _is_done(self, followed: _Followed) -> bool:
        """Whether this gateway sends nothing more to a replica that leaves."""
        if not (self._reader and followed.leaving and followed.draining):
            return False
        return self._membership.let_go(followed.info.incarnation, carrying=self._carrying())

    def _take(self, replica: ReplicaInfo, event: Happened) -> None:
        match event:
            case Unread():
                if self._ledger.is_own(event.id):
                    self._ledger.note(event.id, "unread")
                    self._on_unread(event.id)
            case TierDegraded():
                if event.at >= self._started_at:
                    self._metrics.count_degraded(event.tier)
            case _:
                self._ledger.apply(replica, event)
                self._foreign.apply(replica, event)

    async def _read_stats(self, client: ReplicaClient, followed: _Followed) -> None:
        stats = await client.stats(timeout_s=_STATS_TIMEOUT_S)
        if not followed.leaving:
            self._metrics.engines.put(followed.info.pool, followed.info.replica_id, stats.as_dict())


class _ReplacedError(Exception):
    """Another incarnation answers at the replica's address, so the replica is gone."""


def _is_gone(problem: Exception) -> bool:
    """Whether a replica has ended for certain: its port refuses, or another incarnation has it. Late is not gone."""
    if isinstance(problem, ReplicaLostError):
        return problem.gone and not problem.sent
    return isinstance(problem, _ReplacedError)
