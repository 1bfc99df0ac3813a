# SPDX-License-Identifier: Apache-2.0
"""Which replicas exist, which pairs of them have moved KV, and what is known of each.

`Membership` lives in the gateway's event loop; `disagg.routing.serve` hands it whole new lists as Serve learns of
replicas. `disagg.gateway.replicas.serving` says what the facts mean, `disagg.gateway.replicas.choosing` who is chosen.
A pair is used only after `disagg.gateway.handoff.warm` has proved that it moves KV.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from disagg.gateway.replicas.serving import (
    Application,
    Standing,
    application,
    is_well,
    may_be_warmed,
    may_finish,
    may_serve,
    num_serving,
    pool_standing,
    replica_standing,
)
from disagg.routing.pairs import misfit
from disagg.routing.views import ReplicaInfo, ReplicaView
from pools.client.replica import ReplicaClient
from pools.errors import ReplicaLostError

logger = logging.getLogger(__name__)

PREFILL = "prefill"
DECODE = "decode"
POOLS = (PREFILL, DECODE)


@dataclass
class Member:
    """A live replica, the way to it, what is known of it, and this gateway's own counts on it."""

    info: ReplicaInfo
    client: ReplicaClient
    num_in_flight: int = 0
    """Legs of this gateway there; like the other counts written by `disagg.gateway.replicas.choosing` alone."""
    last_chosen: int = 0
    """Sequence number of the last decision that took it; 0 before the first."""
    reachable: bool = True
    """False after a failed connection, until the replica answers again."""
    quarantined: str | None = None
    """Why the replica is out of routing although it may live, else None; see `disagg.gateway.replicas.watch`."""
    draining: bool = False
    """The replica says itself that it leaves."""
    slow: bool = False
    """The replica lives, but is chosen only where no other one can be."""
    on_probation: bool = False
    """Its pool loses one replica after the other, so this one has to stay well for a while before it is chosen."""
    warm_peers: frozenset[str] = frozenset()
    """Replica ids of the other pool that KV has moved with."""
    local_prefill_tokens: int = 0
    """Prompt tokens that it computes for this gateway without a hand-off."""
    last_view: ReplicaView | None = field(default=None, init=False, repr=False, compare=False)
    """What a policy saw of it last; see `choosing.replica_view`."""

    @property
    def usable(self) -> bool:
        """Whether nothing is wrong with it; see `serving.is_well`."""
        return is_well(self)


@dataclass(frozen=True)
class Pair:
    """The two replicas chosen for one hand-off."""

    prefill: Member
    decode: Member

    @property
    def key(self) -> tuple[str, str]:
        """Their incarnations."""
        return self.prefill.info.incarnation, self.decode.info.incarnation


@dataclass(frozen=True, slots=True)
class Roster:
    """Who may serve, by replica id; made anew with each change of what is known of a replica."""

    prefill: Mapping[str, Member] = field(default_factory=dict)
    decode: Mapping[str, Member] = field(default_factory=dict)
    last_resort: Mapping[str, Member] = field(default_factory=dict)
    """Decode replicas on probation, and those that leave: they finish what they get until the gateway lets them go."""
    finishes_only: bool = False
    """Whether all replicas that could answer leave and say that they drain. The end of the drain would cut a new
    request. So the gateway sends only requests there that it has accepted before."""


class Membership:
    """The members of both pools. Not thread-safe: call it from the gateway's loop."""

    def __init__(
        self,
        connect: Callable[[ReplicaInfo], ReplicaClient],
        on_change: Callable[[], None] = lambda: None,
        *,
        prefill_alone: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nobody.

        Args:
            prefill_alone: whether prefill replicas answer alone where no decode replica can.
            connect: makes the client of a replica. `Membership` closes the client when the replica is gone.
            clock: in seconds.
        """
        self._connect = connect
        self._members: dict[str, dict[str, Member]] = {pool: {} for pool in POOLS}
        # By incarnation: replicas that Serve has taken out of its lists, and that this gateway has not let go of.
        self._leaving: dict[str, Member] = {}
        # By incarnations: pairs that rest, and until when; see `handoff.breaker` and `kv_paths`.
        self._resting: dict[tuple[str, str], float] = {}
        self._prefill_alone = prefill_alone
        self._clock = clock
        self._on_change = on_change
        self.roster = Roster()

    def members(self, pool: str) -> list[Member]:
        return list(self._members[pool].values())

    def replace(self, pool: str, replicas: Collection[ReplicaInfo]) -> None:
        """Take Serve's new list for one pool. A known id with another incarnation is a new replica."""
        old = self._members[pool]
        new: dict[str, Member] = {}
        for info in replicas:
            known = old.get(info.replica_id)
            if known is None or known.info != info:
                known = self._back(info)
            new[info.replica_id] = known
        kept = {replica_id for replica_id, member in new.items() if old.get(replica_id) is member}
        if kept == old.keys() == new.keys():
            return
        self._members[pool] = new
        for replica_id, member in old.items():
            if replica_id not in kept:
                self._leaving[member.info.incarnation] = member
        for member in new.values():
            left = self._leaving.pop(member.info.incarnation, None)
            if left is not None and left is not member:
                left.client.close()
        for other in self._members[DECODE if pool == PREFILL else PREFILL].values():
            other.warm_peers &= kept
        self._changed()

    def cold_pairs(self) -> list[Pair]:
        """Pairs of live replicas that have not moved KV yet."""
        return [
            Pair(p, d)
            for p in self.members(PREFILL)
            for d in self.members(DECODE)
            if d.info.replica_id not in p.warm_peers
            and may_be_warmed(p, d)
            and not self.is_resting(Pair(p, d))
            and misfit(p.info, d.info) is None
        ]

    def misfits(self) -> list[tuple[Pair, str]]:
        """The pairs of live replicas between which no KV can go, and why. They exist while a rolling update runs."""
        pairs = [Pair(p, d) for p in self.members(PREFILL) for d in self.members(DECODE)]
        return [(pair, why) for pair in pairs if (why := misfit(pair.prefill.info, pair.decode.info)) is not None]

    def let_go(self, incarnation: str, *, carrying: bool) -> bool:
        """Let a leaving replica go unless this gateway needs it. Returns whether the gateway sends it nothing more.

        The gateway keeps a replica on which it has legs. While it is `carrying` requests, it also keeps a leaving
        decode replica if no other one could take them.
        """
        member = self._leaving.get(incarnation)
        if member is None:
            return True
        if member.num_in_flight:
            return False
        if carrying and member.info.pool == DECODE and not self.roster.decode:
            return False
        self.forget(incarnation)
        return True

    def forget(self, incarnation: str) -> None:
        """Drop a leaving replica for good, and close its client."""
        member = self._leaving.pop(incarnation, None)
        if member is not None:
            member.client.close()
            self._changed()

    def mark_warm(self, pair: Pair) -> None:
        """Make a pair routable. Ignored if the pair rests, or if one of its replicas is gone or quarantined by now."""
        well = pair.prefill.quarantined is pair.decode.quarantined is None
        if well and not self.is_resting(pair) and self._alive(pair.prefill) and self._alive(pair.decode):
            pair.prefill.warm_peers |= {pair.decode.info.replica_id}
            pair.decode.warm_peers |= {pair.prefill.info.replica_id}
            pair.prefill.reachable = pair.decode.reachable = True
            self._changed()

    def mark_cold(self, pair: Pair, *, rest_s: float = 0.0) -> None:
        """Take a pair out of routing until it is warmed again.

        With `rest_s`, it is not warmed before so many seconds are over and `end_rest` was called. Of several rests the
        one that ends last counts.
        """
        if rest_s > 0:
            until = self._clock() + rest_s
            self._resting[pair.key] = max(until, self._resting.get(pair.key, until))
        pair.prefill.warm_peers -= {pair.decode.info.replica_id}
        pair.decode.warm_peers -= {pair.prefill.info.replica_id}
        self._changed()

    def is_resting(self, pair: Pair) -> bool:
        return pair.key in self._resting

    def end_rest(self, pair: Pair) -> float:
        """Let a pair be warmed again if its rest is over. Returns the seconds for which it still has to rest."""
        until = self._resting.get(pair.key)
        if until is None:
            return 0.0
        left = until - self._clock()
        if left <= 0:
            del self._resting[pair.key]
            self._changed()
        return max(0.0, left)

    def mark_unreachable(self, member: Member) -> None:
        """Stop choosing a replica that cannot be connected to, until it answers or is replaced."""
        if member.reachable:
            member.reachable = False
            self._changed()

    def mark_lost(self, member: Member, error: ReplicaLostError) -> None:
        """A leg was lost on this replica: stop choosing the replica if it could not be connected to."""
        logger.warning("replica %s lost: %s", member.info.replica_id, error)
        if error.unreachable:
            self.mark_unreachable(member)

    def mark_reachable(self, member: Member) -> None:
        if not member.reachable:
            member.reachable = True
            self._changed()

    def quarantine(self, member: Member, reason: str) -> bool:
        """Take a replica out of routing, and make its pairs cold. Returns False if it was out already."""
        if member.quarantined is not None:
            return False
        member.quarantined = reason
        member.warm_peers = frozenset()
        for other in self.members(DECODE if member.info.pool == PREFILL else PREFILL):
            other.warm_peers -= {member.info.replica_id}
        self._changed()
        return True

    def release(self, member: Member, *, draining: bool = False) -> None:
        """Let a replica back in that works, or works and is `draining`. A pair of it is used once the pair is warm."""
        if (member.quarantined, member.draining) != (None, draining):
            member.quarantined, member.draining = None, draining
            self._changed()

    def put_on_probation(self, member: Member) -> None:
        """Keep a replica out of ordinary choice until `end_probation`: its pool loses one replica after the other.

        Tells no listener: `Watch.members_changed`, a listener, calls it while it is being told of the replica.
        """
        member.on_probation = True
        self.roster = self._roster()

    def end_probation(self, member: Member) -> None:
        member.on_probation = False
        self._changed()

    def is_warm(self, member: Member) -> bool:
        """Whether a replica has moved KV, or the other pool has no usable replica that it could move KV with."""
        others = self._members[DECODE if member.info.pool == PREFILL else PREFILL].values()
        return bool(member.warm_peers) or not any(o.usable and misfit(member.info, o.info) is None for o in others)

    def is_listed(self, member: Member) -> bool:
        """Whether Serve has the replica in its lists."""
        return self._alive(member)

    def is_known(self, member: Member) -> bool:
        """Whether Serve has the replica in its lists, or this gateway has not let go of it."""
        return self._alive(member) or self._leaving.get(member.info.incarnation) is member

    def incarnations(self) -> frozenset[str]:
        """The incarnations of all known replicas, see `is_known`."""
        listed = (member.info.incarnation for pool in POOLS for member in self._members[pool].values())
        return frozenset([*listed, *self._leaving])

    # States, see `serving`

    def standing(self, member: Member) -> Standing:
        """The state of one replica."""
        return replica_standing(member, warm=self.is_warm(member))

    def pool_standing(self, pool: str) -> Standing:
        """The state of one pool."""
        return pool_standing(map(self.standing, self.members(pool)))

    def application(self) -> Application:
        """The state of the application."""
        return application(
            prefill=self.pool_standing(PREFILL),
            decode=self.pool_standing(DECODE),
            any_pair=any(not p.warm_peers.isdisjoint(self.roster.decode) for p in self.roster.prefill.values()),
            any_decode=bool(self.roster.decode or self.roster.last_resort) and not self.roster.finishes_only,
            any_prefill=self._prefill_alone and bool(self.roster.prefill),
        )

    def is_last(self, member: Member) -> bool:
        """Whether it is the only replica that answers to clients can come from; false for one that is taken out.

        Prefill replicas that may answer alone count as others.
        """
        if member.info.pool != DECODE or member.quarantined is not None:
            return False
        others = [other for other in self._members[DECODE].values() if other is not member]
        if self._prefill_alone:
            others += self._members[PREFILL].values()
        return not any(other.usable for other in others)

    def num_routable(self, pool: str) -> int:
        """Replicas that count as serving in their pool."""
        return num_serving(map(self.standing, self.members(pool)))

    def num_warm_pairs(self) -> int:
        return sum(len(m.warm_peers) for m in self.members(PREFILL))

    def _changed(self) -> None:
        """Make the roster anew and tell the listener, after something known of a replica has changed."""
        self.roster = self._roster()
        self._on_change()

    def _roster(self) -> Roster:
        decodes = self._members[DECODE]
        well = {replica_id: member for replica_id, member in decodes.items() if may_serve(member)}
        last_resort = {m.info.replica_id: m for m in self._leaving.values() if m.info.pool == DECODE and may_finish(m)}
        last_resort |= {replica_id: m for replica_id, m in decodes.items() if m.on_probation and is_well(m)}
        prefill = {replica_id: member for replica_id, member in self._members[PREFILL].items() if may_serve(member)}
        anybody = well or (prefill if self._prefill_alone else {})
        return Roster(
            prefill=prefill,
            decode=well,
            last_resort=last_resort,
            finishes_only=not anybody and bool(last_resort) and all(m.draining for m in last_resort.values()),
        )

    def _back(self, info: ReplicaInfo) -> Member:
        """A new member, or the old one if the replica was only out of Serve's list, as when the controller restarts."""
        left = self._leaving.get(info.incarnation)
        if left is None or left.info != info:
            return Member(info, self._connect(info))
        left.warm_peers = frozenset()
        return left

    def _alive(self, member: Member) -> bool:
        return self._members[member.info.pool].get(member.info.replica_id) is member
