# SPDX-License-Identifier: Apache-2.0
"""Who is there, who is warm with whom, and who is chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache

import pytest

from disagg.gateway.replicas.choosing import Chooser
from disagg.gateway.replicas.membership import DECODE, POOLS, PREFILL, Member, Membership, Pair
from disagg.routing.least_loaded import LeastLoaded
from disagg.routing.views import Mode, ReplicaInfo, RequestView
from tests.support.replica_clients import lonely_membership


def info(replica_id: str, incarnation: str = "1") -> ReplicaInfo:
    pool = PREFILL if replica_id.startswith("p") else DECODE
    return ReplicaInfo(replica_id, pool, f"http://{replica_id}:{incarnation}", "e", incarnation, 16, 1000)


@pytest.fixture
def members() -> Membership:
    """Two warm prefill and two decode replicas."""
    membership = lonely_membership()
    membership.replace(PREFILL, [info("p0"), info("p1")])
    membership.replace(DECODE, [info("d0"), info("d1")])
    for pair in membership.cold_pairs():
        membership.mark_warm(pair)
    return membership


def ids(pairs: list[Pair]) -> set[str]:
    return {f"{pair.prefill.info.replica_id}-{pair.decode.info.replica_id}" for pair in pairs}


LIMIT = 100
"""Prompt tokens that a decode replica may compute at a time."""


@lru_cache(maxsize=1)
def chooser(members: Membership) -> Chooser:
    """The one of these members, which knows whose turn it is."""
    return Chooser(members, LeastLoaded(), max_local_prefill_tokens=LIMIT, max_prefill_alone_tokens=0)


def pick_pair(members: Membership, *, without: Collection[str] = (), decode: Member | None = None) -> Pair | None:
    """The pair of the next hand-off, over at once; its replicas not in `without`, its decode replica `decode`."""
    decode_id = None if decode is None else decode.info.replica_id
    view = RequestView("chat", [[1]], 1, {"local": "test"}, without=frozenset(without), decode_id=decode_id)
    with chooser(members).reserve(view) as reservation:
        return reservation.pair


def has_pair(members: Membership, *, without: Collection[str] = (), decode: Member | None = None) -> bool:
    decode_id = None if decode is None else decode.info.replica_id
    view = RequestView("chat", [[1]], 1, {"local": "test"}, without=frozenset(without), decode_id=decode_id)
    return chooser(members).decide(view).mode == "handoff"


def pick_decode(members: Membership, *, without: Collection[str] = (), num_tokens: int = 0) -> Member | None:
    """The decode replica of the next request without a hand-off, over at once; None when there is none with room."""
    with chooser(members).reserve(alone(without, num_tokens)) as reservation:
        return None if reservation.decision.refusal else reservation.answering


def has_decode(members: Membership, *, without: Collection[str] = ()) -> bool:
    """Whether there is a decode replica, with room or without."""
    return chooser(members).decide(alone(without, LIMIT)).refusal in (None, "no_room")


def alone(without: Collection[str], num_tokens: int) -> RequestView:
    ruled_out: dict[Mode, str] = {"handoff": "test", "primed": "test"}
    return RequestView("chat", [[1]], num_tokens, ruled_out, without=frozenset(without))


def test_new_pairs_are_cold() -> None:
    """Replicas are usable at once, pairs only after they were warmed."""
    membership = lonely_membership()
    membership.replace(DECODE, [info("d0")])
    assert pick_decode(membership) is not None and membership.num_routable(DECODE) == 1
    membership.replace(PREFILL, [info("p0"), info("p1")])
    assert ids(membership.cold_pairs()) == {"p0-d0", "p1-d0"}
    assert pick_pair(membership) is None
    assert [membership.num_routable(pool) for pool in POOLS] == [0, 0]
    membership.mark_warm(membership.cold_pairs()[0])
    assert ids(membership.cold_pairs()) == {"p1-d0"}
    assert [membership.num_routable(pool) for pool in POOLS] == [1, 1]
    assert membership.num_warm_pairs() == 1


def test_four_pairs_in_turn(members: Membership) -> None:
    """Idle replicas share hand-offs over all four pairs."""
    chosen = Counter(next(iter(ids([pair]))) for _ in range(8) if (pair := pick_pair(members)))
    assert chosen == {"p0-d0": 2, "p0-d1": 2, "p1-d0": 2, "p1-d1": 2}


def test_load_decides_before_turns(members: Membership) -> None:
    """What this gateway has running somewhere steers the next request away from there."""
    members.members(PREFILL)[0].num_in_flight = 1
    members.members(DECODE)[1].num_in_flight = 1
    assert [ids([pair]) for _ in range(2) if (pair := pick_pair(members))] == [{"p1-d0"}, {"p1-d0"}]
    decode = pick_decode(members)
    assert decode is not None and decode.info.replica_id == "d0"


def test_without_leaves_replicas_out(members: Membership) -> None:
    """Replicas that were tried are not chosen again, on either side."""
    assert all(pick_pair(members, without={"p0", "d1"}).prefill.info.replica_id == "p1" for _ in range(4))  # type: ignore[union-attr]
    assert pick_pair(members, without={"p0", "p1"}) is None
    assert pick_decode(members, without={"d0", "d1"}) is None


def test_new_incarnation_is_a_new_replica(members: Membership) -> None:
    """A restarted replica has moved no KV and its old self cannot be marked any more."""
    old = next(m for m in members.members(PREFILL) if m.info.replica_id == "p0")
    kept = next(m for m in members.members(PREFILL) if m.info.replica_id == "p1")
    peer = members.members(DECODE)[0]
    members.replace(PREFILL, [info("p0", "2"), info("p1")])
    assert ids(members.cold_pairs()) == {"p0-d0", "p0-d1"}
    assert kept in members.members(PREFILL) and old not in members.members(PREFILL)
    assert all(m.warm_peers == {"p1"} for m in members.members(DECODE))
    members.mark_warm(Pair(old, peer))
    assert ids(members.cold_pairs()) == {"p0-d0", "p0-d1"}


def test_restart_on_the_decode_side(members: Membership) -> None:
    """A restarted decode replica drops out of its peers' warmth, too."""
    members.replace(DECODE, [info("d0"), info("d1", "2")])
    assert ids(members.cold_pairs()) == {"p0-d1", "p1-d1"}
    assert all(m.warm_peers == {"d0"} for m in members.members(PREFILL))


def test_removal(members: Membership) -> None:
    """A removed replica leaves no trace, and the same list again changes nothing."""
    changes: list[int] = []
    members._on_change = lambda: changes.append(1)
    members.replace(DECODE, [info("d1")])
    members.replace(DECODE, [info("d1")])
    assert len(changes) == 1
    assert members.num_warm_pairs() == 2
    assert all(m.warm_peers == {"d1"} for m in members.members(PREFILL))
    members.replace(PREFILL, [])
    assert pick_pair(members) is None
    assert members.num_routable(DECODE) == 1


def test_unreachable_until_it_answers(members: Membership) -> None:
    """A replica that refuses connections is left out and comes back warm."""
    p0 = members.members(PREFILL)[0]
    members.mark_unreachable(p0)
    assert all(pick_pair(members).prefill is not p0 for _ in range(4))  # type: ignore[union-attr]
    assert members.num_routable(PREFILL) == 1
    members.mark_reachable(p0)
    assert p0 in [pick_pair(members).prefill for _ in range(4)]  # type: ignore[union-attr]


def test_warming_makes_reachable(members: Membership) -> None:
    """KV that moved proves both replicas."""
    pair = pick_pair(members)
    assert pair is not None
    members.mark_unreachable(pair.decode)
    members.mark_warm(pair)
    assert pair.decode.reachable


def test_mark_cold(members: Membership) -> None:
    """A pair taken out of routing is cold again, its replicas stay warm with others."""
    pair = pick_pair(members)
    assert pair is not None
    members.mark_cold(pair)
    assert ids(members.cold_pairs()) == ids([pair])
    assert members.num_warm_pairs() == 3


def test_changes_are_told(members: Membership) -> None:
    """Every change of who can be used is told once."""
    changes: list[int] = []
    members._on_change = lambda: changes.append(1)
    member = members.members(DECODE)[0]
    members.mark_unreachable(member)
    members.mark_unreachable(member)
    members.mark_reachable(member)
    members.mark_reachable(member)
    assert len(changes) == 2


def test_connections_are_kept_as_long_as_their_replica_is_known() -> None:
    """The client is closed when this gateway lets go of a replica, and when another one comes under its incarnation."""
    membership = lonely_membership()
    membership.replace(PREFILL, [info("p0", "1"), info("p1", "2")])
    p0, p1 = membership.members(PREFILL)
    membership.replace(PREFILL, [])
    assert not p0.client.closed and not p1.client.closed
    assert membership.let_go("1", carrying=False)
    assert p0.client.closed and not p1.client.closed
    membership.replace(PREFILL, [replace(info("p1", "2"), url="http://elsewhere:2")])
    assert p1.client.closed and not membership.members(PREFILL)[0].client.closed


def test_a_replica_that_leaves_is_let_go_when_nothing_runs_there(members: Membership) -> None:
    """It is not chosen any more, and its connections are kept until this gateway has nothing there."""
    members.replace(DECODE, [info("d0", "7"), info("d1", "8")])
    for pair in members.cold_pairs():
        members.mark_warm(pair)
    leaving = members.members(DECODE)[0]
    leaving.num_in_flight = 1
    members.replace(DECODE, [info("d1", "8")])
    pairs = [pick_pair(members) for _ in range(4)]
    assert ids([pair for pair in pairs if pair]) == {"p0-d1", "p1-d1"}
    chosen = [pick_decode(members) for _ in range(3)]
    assert [member and member.info.replica_id for member in chosen] == ["d1"] * 3
    assert not members.let_go("7", carrying=False) and not leaving.client.closed
    leaving.num_in_flight = 0
    assert members.let_go("7", carrying=False)
    assert leaving.client.closed


def test_the_last_decode_replica_serves_what_is_carried_although_it_leaves(members: Membership) -> None:
    """An application that ends finishes the requests it has accepted, those without a replica yet as well."""
    members.replace(DECODE, [info("d0", "7")])
    members.let_go("1", carrying=False)
    members.replace(DECODE, [])
    assert not members.let_go("7", carrying=True)
    chosen = pick_decode(members)
    assert chosen is not None and chosen.info.replica_id == "d0"
    assert pick_decode(members, without={"d0"}) is None
    assert members.let_go("7", carrying=False)
    assert pick_decode(members) is None


def test_replicas_that_leave_are_not_for_want_of_room(members: Membership) -> None:
    """They are chosen only when no other one can be, room or none, and have to have room themselves."""
    members.replace(DECODE, [info("d0", "7"), info("d1", "8")])
    members.let_go("1", carrying=False)
    d0, d1 = members.members(DECODE)
    members.replace(DECODE, [info("d1", "8")])
    d1.local_prefill_tokens = 1
    assert pick_decode(members, num_tokens=LIMIT) is None and has_decode(members)
    d0.local_prefill_tokens = 1
    members.replace(DECODE, [])
    assert pick_decode(members, num_tokens=LIMIT) is None and has_decode(members)
    d1.local_prefill_tokens = 0
    chosen = pick_decode(members, without={"d0"}, num_tokens=LIMIT)
    assert chosen is not None and chosen.info.replica_id == "d1"
    assert not has_decode(members, without={"d0", "d1"})


def test_a_replica_that_comes_back_keeps_its_count(members: Membership) -> None:
    """Serve's list may be empty for a moment when its controller restarts; the legs that run there still count."""
    replicas = [info("d0", "7")]
    members.replace(DECODE, replicas)
    member = members.members(DECODE)[0]
    member.num_in_flight = 3
    members.replace(DECODE, [])
    members.replace(DECODE, replicas)
    assert members.members(DECODE) == [member] and member.num_in_flight == 3
    assert pick_decode(members) is member


def test_replicas_that_do_not_fit_are_no_pair() -> None:
    """During a rolling update old prefill and new decode replicas are never warmed and never chosen together."""
    membership = lonely_membership()
    old, new = replace(info("p0"), kv_fit="old"), replace(info("p1"), kv_fit="new")
    membership.replace(PREFILL, [old, new])
    membership.replace(DECODE, [replace(info("d0"), kv_fit="new")])
    assert ids(membership.cold_pairs()) == {"p1-d0"}
    assert [(ids([pair]), "KV depends on" in why) for pair, why in membership.misfits()] == [({"p0-d0"}, True)]


def test_a_pair_that_rests() -> None:
    """A pair that is left alone is neither warm nor to be warmed, until it has rested; that is told once."""
    now = [100.0]
    members = lonely_membership(clock=lambda: now[0])
    members.replace(PREFILL, [info("p0", "p0-1")])
    members.replace(DECODE, [info("d0", "d0-1"), info("d1", "d1-1")])
    for pair in members.cold_pairs():
        members.mark_warm(pair)
    (pair, *_) = [Pair(p, d) for p in members.members(PREFILL) for d in members.members(DECODE)]
    members.mark_cold(pair, rest_s=5)
    # A warm-up that began before that ends.
    members.mark_warm(pair)
    assert members.is_resting(pair) and not members.cold_pairs() and members.num_warm_pairs() == 1
    changes: list[int] = []
    members._on_change = lambda: changes.append(1)
    assert members.end_rest(pair) == 5 and members.is_resting(pair) and not changes
    now[0] += 5
    assert [members.end_rest(pair), members.end_rest(pair)] == [0, 0]
    assert ids(members.cold_pairs()) == ids([pair]) and len(changes) == 1
    members.mark_warm(pair)
    assert members.num_warm_pairs() == 2


def test_the_longest_rest_counts() -> None:
    """A breaker's half second does not end the minute after wrong KV, whichever came first."""
    now = [0.0]
    members = lonely_membership(clock=lambda: now[0])
    members.replace(PREFILL, [info("p0", "p0-1")])
    members.replace(DECODE, [info("d0", "d0-1"), info("d1", "d1-1")])
    for pair, rests in zip(members.cold_pairs(), ([0.5, 60], [60, 0.5]), strict=True):
        for rest_s in rests:
            members.mark_cold(pair, rest_s=rest_s)
        assert members.end_rest(pair) == 60
    now[0] = 59
    assert [members.end_rest(Pair(members.members(PREFILL)[0], d)) for d in members.members(DECODE)] == [1, 1]
    assert not members.cold_pairs()


def test_has_pair_says_what_pick_pair_would_find(members: Membership) -> None:
    """With replicas left out, a settled decode replica, and none that is warm."""
    d0, d1 = members.members(DECODE)
    assert has_pair(members) and has_pair(members, without={"p0", "d1"}) and has_pair(members, decode=d0)
    assert not has_pair(members, without={"p0", "p1"}) and not has_pair(members, without={"d0"}, decode=d0)
    for pair in [Pair(p, d1) for p in members.members(PREFILL)]:
        members.mark_cold(pair)
    assert not has_pair(members, decode=d1) and has_pair(members)
    members.mark_unreachable(d0)
    assert not has_pair(members)


def test_quarantine_takes_the_replica_and_its_pairs_out(members: Membership) -> None:
    """It is not chosen nor warmed, no warm-up that ends late brings it back, and its pairs begin cold again."""
    d0 = members.members(DECODE)[0]
    pairs = [Pair(p, d0) for p in members.members(PREFILL)]
    assert members.quarantine(d0, "hang") and not members.quarantine(d0, "unanswered")
    assert d0.quarantined == "hang" and members.num_warm_pairs() == 2
    members.mark_warm(pairs[0])
    assert {ids([pair]).pop() for _ in range(4) if (pair := pick_pair(members))} == {"p0-d1", "p1-d1"}
    assert {m.info.replica_id for _ in range(2) if (m := pick_decode(members))} == {"d1"}
    assert not members.cold_pairs() and members.num_routable(DECODE) == 1
    members.release(d0)
    assert ids(members.cold_pairs()) == {"p0-d0", "p1-d0"}
    assert {m.info.replica_id for _ in range(2) if (m := pick_decode(members))} == {"d0", "d1"}


def test_quarantine_ends_with_the_incarnation(members: Membership) -> None:
    """A successor under the same name is a new replica, with nothing against it."""
    d0 = members.members(DECODE)[0]
    members.quarantine(d0, "hang")
    d0.slow = True
    members.put_on_probation(d0)
    members.replace(DECODE, [info("d0", "2"), info("d1")])
    new = members.members(DECODE)[0]
    assert (new.quarantined, new.slow, new.on_probation, new.draining) == (None, False, False, False)


def test_slow_replicas_come_last(members: Membership) -> None:
    """However much the others carry, and still before nobody."""
    p0, d0 = members.members(PREFILL)[0], members.members(DECODE)[0]
    p0.slow = d0.slow = True
    members.members(PREFILL)[1].num_in_flight = members.members(DECODE)[1].num_in_flight = 9
    assert {ids([pair]).pop() for _ in range(4) if (pair := pick_pair(members))} == {"p1-d1"}
    assert {m.info.replica_id for _ in range(2) if (m := pick_decode(members))} == {"d1"}
    chosen = pick_decode(members, without={"d1"})
    assert chosen is d0


def test_probation(members: Membership) -> None:
    """A replica on probation is warmed and not chosen; a decode replica is, where there is no other."""
    p0, d0 = members.members(PREFILL)[0], members.members(DECODE)[0]
    members.put_on_probation(p0)
    members.put_on_probation(d0)
    assert {ids([pair]).pop() for _ in range(4) if (pair := pick_pair(members))} == {"p1-d1"}
    assert members.num_routable(DECODE) == 1
    assert pick_decode(members, without={"d1"}) is d0 and pick_pair(members, without={"d1"}) is None
    members.end_probation(d0)
    assert members.num_routable(DECODE) == 2


def test_warm_without_anybody_to_be_warm_with(members: Membership) -> None:
    """Only replicas of the other pool that are usable and fit can keep one waiting for KV to move."""
    p0 = members.members(PREFILL)[0]
    for decode in members.members(DECODE):
        members.mark_cold(Pair(p0, decode))
    assert not members.is_warm(p0)
    members.mark_unreachable(members.members(DECODE)[0])
    members.quarantine(members.members(DECODE)[1], "hang")
    assert members.is_warm(p0)
    members.replace(DECODE, [replace(info("d2"), kv_fit="another")])
    assert members.is_warm(p0)
    members.replace(DECODE, [info("d2")])
    assert not members.is_warm(p0)


def test_replicas_that_only_finish_what_they_have() -> None:
    """A decode replica that Serve does not list any more takes new requests until it says that it drains."""
    members = lonely_membership(prefill_alone=False)
    members.replace(DECODE, [info("d0", "7")])
    d0 = members.members(DECODE)[0]
    members.replace(DECODE, [])
    assert pick_decode(members) is d0 and not members.roster.finishes_only
    members.release(d0, draining=True)
    assert pick_decode(members) is d0 and members.roster.finishes_only
    members.replace(DECODE, [info("d1", "8")])
    assert not members.roster.finishes_only
    members.put_on_probation(members.members(DECODE)[0])
    assert not members.roster.finishes_only
    assert not lonely_membership().roster.finishes_only


def test_draining_replicas_are_not_chosen(members: Membership) -> None:
    """A replica that says it leaves gets nothing more."""
    members.release(members.members(DECODE)[0], draining=True)
    assert {m.info.replica_id for _ in range(2) if (m := pick_decode(members))} == {"d1"}
    assert members.num_routable(DECODE) == 1
