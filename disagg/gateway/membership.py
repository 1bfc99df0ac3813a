# SPDX-License-Identifier: Apache-2.0
"""Which replicas exist, which pairs of them have moved KV, and what this gateway has running on each.

Lives in the gateway's event loop; `disagg.router.serve` hands it whole new lists as Serve learns of replicas. A replica
is used once it is known, a pair only after `disagg.gateway.warm` has proved it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from disagg.router.load import choose_decode, choose_pair
from disagg.router.views import PairView, ReplicaInfo, ReplicaView

PREFILL = "prefill"
DECODE = "decode"
POOLS = (PREFILL, DECODE)


@dataclass
class Member:
    """A live replica and this gateway's own count on it."""

    info: ReplicaInfo
    num_in_flight: int = 0
    last_chosen: int = 0
    reachable: bool = True
    """False after a failed connection, until it answers again."""
    warm_peers: set[str] = field(default_factory=set)
    """Replica ids of the other pool that KV has moved with."""
    remote_engine_id: str | None = None
    """Name of its KV memory at Mooncake's bootstrap server, once `disagg.gateway.transfer_push` has asked."""

    def view(self) -> ReplicaView:
        return ReplicaView(self.info.replica_id, self.num_in_flight, self.last_chosen)


@dataclass(frozen=True)
class Pair:
    """The two replicas chosen for one hand-off."""

    prefill: Member
    decode: Member


class Membership:
    """The members of both pools. Not thread-safe: call it from the gateway's loop."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self._members: dict[str, dict[str, Member]] = {pool: {} for pool in POOLS}
        self._pair_chosen: dict[tuple[str, str], int] = {}
        self._sequence = 0
        self._on_change = on_change

    def members(self, pool: str) -> list[Member]:
        return list(self._members[pool].values())

    def urls(self) -> set[str]:
        """Every address that the gateway speaks to."""
        infos = [member.info for pool in POOLS for member in self.members(pool)]
        return {info.url for info in infos} | {info.bootstrap_url for info in infos if info.bootstrap_url}

    def replace(self, pool: str, replicas: Collection[ReplicaInfo]) -> None:
        """Take Serve's new list for one pool. A known id with another incarnation is a new replica."""
        old = self._members[pool]
        new: dict[str, Member] = {}
        for info in replicas:
            known = old.get(info.replica_id)
            new[info.replica_id] = known if known is not None and known.info == info else Member(info)
        kept = {replica_id for replica_id, member in new.items() if old.get(replica_id) is member}
        if kept == old.keys() == new.keys():
            return
        self._members[pool] = new
        for other in self._members[DECODE if pool == PREFILL else PREFILL].values():
            other.warm_peers &= kept
        self._pair_chosen = {
            pair: at for pair, at in self._pair_chosen.items() if pair[0 if pool == PREFILL else 1] in kept
        }
        self._on_change()

    def cold_pairs(self) -> list[Pair]:
        """Pairs of live replicas that have not moved KV yet."""
        return [
            Pair(p, d)
            for p in self.members(PREFILL)
            for d in self.members(DECODE)
            if d.info.replica_id not in p.warm_peers
        ]

    def mark_warm(self, pair: Pair) -> None:
        """Make a pair routable; ignored when one of the two has gone meanwhile."""
        if self._alive(pair.prefill) and self._alive(pair.decode):
            pair.prefill.warm_peers.add(pair.decode.info.replica_id)
            pair.decode.warm_peers.add(pair.prefill.info.replica_id)
            pair.prefill.reachable = pair.decode.reachable = True
            self._on_change()

    def mark_cold(self, pair: Pair) -> None:
        """Take a pair out of routing until it is warmed again."""
        pair.prefill.warm_peers.discard(pair.decode.info.replica_id)
        pair.decode.warm_peers.discard(pair.prefill.info.replica_id)
        self._on_change()

    def mark_unreachable(self, member: Member) -> None:
        """Stop choosing a replica that cannot be connected to, until it answers or is replaced."""
        if member.reachable:
            member.reachable = False
            self._on_change()

    def mark_reachable(self, member: Member) -> None:
        if not member.reachable:
            member.reachable = True
            self._on_change()

    def pick_pair(self, *, without: Collection[str] = (), decode: Member | None = None) -> Pair | None:
        """The warm pair for the next hand-off, its replicas not in `without`; None when there is none.

        `decode` fixes the decode replica, so that only the prefill replica is chosen.
        """
        views = []
        by_ids: dict[tuple[str, str], Pair] = {}
        for p in self._usable(PREFILL, without):
            for d in self._usable(DECODE, without):
                if d.info.replica_id in p.warm_peers and decode in (None, d):
                    key = (p.info.replica_id, d.info.replica_id)
                    by_ids[key] = Pair(p, d)
                    views.append(PairView(p.view(), d.view(), self._pair_chosen.get(key, 0)))
        chosen = choose_pair(views)
        if chosen is None:
            return None
        key = (chosen.prefill.replica_id, chosen.decode.replica_id)
        pair = by_ids[key]
        self._sequence += 1
        self._pair_chosen[key] = pair.prefill.last_chosen = pair.decode.last_chosen = self._sequence
        return pair

    def pick_decode(self, *, without: Collection[str] = ()) -> Member | None:
        """The decode replica for a request that it prefills itself; None when there is none."""
        usable = {m.info.replica_id: m for m in self._usable(DECODE, without)}
        chosen = choose_decode(m.view() for m in usable.values())
        if chosen is None:
            return None
        member = usable[chosen.replica_id]
        self._sequence += 1
        member.last_chosen = self._sequence
        return member

    def num_routable(self, pool: str) -> int:
        """Replicas that requests can go to: reachable, and with at least one warm peer when the other pool has any."""
        others = self._members[DECODE if pool == PREFILL else PREFILL]
        return sum(1 for m in self.members(pool) if m.reachable and (m.warm_peers or not others))

    def num_warm_pairs(self) -> int:
        return sum(len(m.warm_peers) for m in self.members(PREFILL))

    def _usable(self, pool: str, without: Collection[str]) -> Iterable[Member]:
        return (m for m in self._members[pool].values() if m.reachable and m.info.replica_id not in without)

    def _alive(self, member: Member) -> bool:
        return self._members[member.info.pool].get(member.info.replica_id) is member
