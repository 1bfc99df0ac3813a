# SPDX-License-Identifier: Apache-2.0
"""Asks every replica how its engine is. Takes replicas that hang out of routing until they work again.

One task asks one replica. `Membership` keeps what the tasks find; `suspicion` judges what takes more than one answer.
When a replica is taken out, this gateway's legs on it fail at once, so that their requests can go on elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from disagg.gateway.background import Background
from disagg.gateway.replicas.membership import DECODE, POOLS, Member, Membership
from disagg.gateway.replicas.suspicion import CrashLoop, ProbeTime, Slowness
from disagg.observability.metrics import Metrics
from pools.client.messages import ReplicaHealth
from pools.errors import ReplicaLostError, UnusableAnswerError

logger = logging.getLogger(__name__)

_ANSWER_S = 2.0
_MISSES = 2
_MISSES_OF_THE_LAST = 5
"""The last replica that could answer may be slow to say so: nobody else could serve what runs there."""
_LATE_S = 0.5
"""If a question fails this much later than it should, the gateway's own loop stood still: that is no miss."""
_BROKEN = 5
"""Connections in a row that the process takes and that then break: from so many on, each counts as a miss."""
_AGAIN_S = 0.1
"""Wait after a connection that broke. The next connection shows whether the process is gone."""

UNANSWERED = "unanswered"


@dataclass(eq=False)
class _Watched:
    member: Member
    misses: int = 0
    broken: int = 0
    """Questions in a row whose connection broke off."""
    probe: ProbeTime | None = None
    ok_since: float | None = None
    """Since when a replica on probation has been well, on the watch's clock. A prefill replica must be warm, too."""
    told: bool = False
    """Whether the log says already that this suspect replica stays in use."""


class Watch:
    """Watches the members of both pools. Belongs to the gateway's loop."""

    def __init__(
        self,
        membership: Membership,
        metrics: Metrics,
        background: Background,
        *,
        interval_s: float,
        probation_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Start with nobody to watch.

        Args:
            interval_s: seconds between two questions to a replica.
            probation_s: how long a replica must be well before it is chosen, when its pool loses one after the other.
            clock: seconds; the loop's by default.
        """
        self._membership = membership
        self._metrics = metrics
        self._background = background
        self._interval_s = interval_s
        self._probation_s = probation_s
        self._clock = clock or asyncio.get_running_loop().time
        self._watched: dict[str, _Watched] = {}
        self._failures: set[type[Exception]] = set()
        self._told_own = False
        self._slowness = {pool: Slowness() for pool in POOLS}
        self._crash_loops = {pool: CrashLoop() for pool in POOLS}

    def members_changed(self) -> None:
        """Begin to watch every replica that is not watched yet, and count those that are lost. Returns at once."""
        for member in [member for pool in POOLS for member in self._membership.members(pool)]:
            if not member.reachable:
                self._count_loss(member)
            if member.info.incarnation not in self._watched:
                if self._crash_loops[member.info.pool].is_on(self._clock()):
                    self._membership.put_on_probation(member)
                watched = self._watched[member.info.incarnation] = _Watched(member)
                self._background.forever(self._follow(watched))
        for watched in self._watched.values():
            if watched.member.quarantined and not self._membership.is_listed(watched.member):
                self._count_loss(watched.member)

    async def _follow(self, watched: _Watched) -> None:
        try:
            while self._membership.is_known(watched.member):
                await asyncio.sleep(await self._asked(watched))
        finally:
            self._watched.pop(watched.member.info.incarnation, None)

    async def _asked(self, watched: _Watched) -> float:
        """As `_ask`, but an unexpected error of the watch is no miss of the replica, and does not end the watch."""
        try:
            return await self._ask(watched)
        except Exception as exc:
            if type(exc) not in self._failures:
                self._failures.add(type(exc))
                logger.exception("replica %s could not be watched; it is tried again", watched.member.info.replica_id)
            return self._interval_s

    async def _ask(self, watched: _Watched) -> float:
        """Ask once and take the answer. Returns the seconds until the next question."""
        member = watched.member
        began = self._clock()
        try:
            health = await member.client.health(timeout_s=_ANSWER_S)
        except UnusableAnswerError:
            self._miss(watched)
            return self._interval_s
        except ReplicaLostError as exc:
            if not exc.gone and self._clock() - began > _ANSWER_S + _LATE_S:
                return 0.0
            return self._take_loss(watched, exc, self._clock() - began)
        if health.incarnation != member.info.incarnation:
            # Another process has the replica's address by now.
            self._membership.mark_unreachable(member)
        else:
            self._take(watched, health)
        return self._interval_s

    def _take_loss(self, watched: _Watched, error: ReplicaLostError, took_s: float) -> float:
        """Handle a question that failed after `took_s` seconds. Returns the seconds until the next question."""
        if error.own:
            if not self._told_own:
                self._told_own = True
                logger.error("replicas cannot be watched for want of descriptors or memory here: %s", error)
            return self._interval_s
        if error.unreachable:
            self._membership.mark_unreachable(watched.member)
        if error.gone:
            # A refused connection: the process has ended, and all its connections break by themselves. A connection
            # that broke: the next one shows whether the process is gone, until `_BROKEN` have broken in a row.
            watched.broken = watched.broken + 1 if error.sent else 0
            if watched.broken >= _BROKEN:
                self._miss(watched)
            return _AGAIN_S if error.sent else self._interval_s
        self._miss(watched)
        # A question may fail at once, e.g. without a route to the host. The next one still waits out the interval.
        return max(0.0, self._interval_s - took_s)

    def _miss(self, watched: _Watched) -> None:
        watched.misses += 1
        watched.ok_since = None
        limit = _MISSES_OF_THE_LAST if self._membership.is_last(watched.member) else _MISSES
        if watched.misses >= limit:
            self._quarantine(watched, UNANSWERED)

    def _take(self, watched: _Watched, health: ReplicaHealth) -> None:
        member = watched.member
        watched.misses = watched.broken = 0
        if health.probe_s is not None:
            watched.probe = ProbeTime(health.probe_s, health.num_probes)
        if health.state == "suspect":
            watched.ok_since = None
            self._suspect(watched, health.reason or "other")
            return
        watched.told = False
        if member.quarantined is not None:
            logger.warning("replica %s works again and is warmed before it is used", member.info.replica_id)
        self._membership.release(member, draining=health.state == "draining")
        self._membership.mark_reachable(member)
        self._judge_pool(member.info.pool)
        self._judge_probation(watched)

    def _suspect(self, watched: _Watched, reason: str) -> None:
        """Take a replica out whose engine hangs, unless nobody could take over what runs there."""
        if not self._membership.is_last(watched.member):
            self._quarantine(watched, reason)
        elif not watched.told:
            watched.told = True
            logger.error(
                "replica %s is suspect (%s), and stays in use because nobody else could answer",
                watched.member.info.replica_id,
                reason,
            )

    def _quarantine(self, watched: _Watched, reason: str) -> None:
        info = watched.member.info
        if self._membership.quarantine(watched.member, reason):
            self._metrics.quarantined(info.pool, reason)
            logger.error(
                "replica %s is taken out of routing (%s); what ran there goes elsewhere", info.replica_id, reason
            )
        # Fail the legs each time: a request may have been on its way there when the replica was taken out.
        watched.member.client.fail(
            ReplicaLostError(f"replica {info.replica_id} hangs ({reason})", sent=True, gone=False)
        )

    def _judge_pool(self, pool: str) -> None:
        members = self._membership.members(pool)
        watched = {m.info.incarnation: self._watched.get(m.info.incarnation) for m in members if m.usable}
        slow = self._slowness[pool].judge({name: w.probe for name, w in watched.items() if w and w.probe})
        self._take_slow(members, slow)

    def _take_slow(self, members: Collection[Member], slow: Collection[str]) -> None:
        for member in members:
            is_slow = member.info.incarnation in slow
            if is_slow != member.slow:
                member.slow = is_slow
                logger.warning("replica %s is %s", member.info.replica_id, "slow" if is_slow else "not slow any more")

    def _judge_probation(self, watched: _Watched) -> None:
        member = watched.member
        if not member.on_probation:
            return
        # A decode replica need not be warm: it can compute prompts itself.
        if member.info.pool != DECODE and not self._membership.is_warm(member):
            watched.ok_since = None
        elif watched.ok_since is None:
            watched.ok_since = self._clock()
        elif self._clock() - watched.ok_since >= self._probation_s:
            self._membership.end_probation(member)

    def _count_loss(self, member: Member) -> None:
        info = member.info
        if self._crash_loops[info.pool].count_loss(info.incarnation, self._clock()):
            self._metrics.crash_loops.labels(info.pool).inc()
            logger.error(
                "the %s pool loses one replica after the other; new ones are used only after %g s without trouble",
                info.pool,
                self._probation_s,
            )
