# SPDX-License-Identifier: Apache-2.0
"""Who gets the next request, by load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from disagg.routing.least_loaded import LeastLoaded
from disagg.routing.views import Decision, Mode, PairView, ReplicaView, RequestView, Snapshot

PLAIN = RequestView("chat", [[1, 2, 3]], 3, {})
ALONE: Mapping[Mode, str] = {"handoff": "short", "primed": "short"}
LOCAL = replace(PLAIN, ruled_out=ALONE)


def prefill(replica_id: str, num_in_flight: int = 0, last_chosen: int = 0, *, slow: bool = False) -> ReplicaView:
    """One that has moved KV with `d0` and `d1`."""
    return ReplicaView(replica_id, num_in_flight, last_chosen, slow=slow, warm_peers=frozenset({"d0", "d1"}))


def decode(
    replica_id: str, num_in_flight: int = 0, last_chosen: int = 0, tokens: int = 0, *, slow: bool = False
) -> ReplicaView:
    return ReplicaView(replica_id, num_in_flight, last_chosen, tokens, slow)


P0, P1, D0, D1 = prefill("p0"), prefill("p1"), decode("d0"), decode("d1")
TWO_BY_TWO = Snapshot((P0, P1), (D0, D1))

HANDOFFS: dict[str, tuple[Snapshot, tuple[str, str]]] = {
    "prefill load comes first": (Snapshot((prefill("p0", 1), prefill("p1", 0, 9)), (decode("d0", 7),)), ("p1", "d0")),
    "decode load comes second": (
        Snapshot((prefill("p0", 2),), (decode("d0", 3), decode("d1", 2, 9)), (), {("p0", "d1"): 9}),
        ("p0", "d1"),
    ),
    "slow comes last, whatever the others carry": (
        Snapshot((prefill("p0", slow=True), prefill("p1", 9)), (decode("d0", slow=True), decode("d1", 9))),
        ("p1", "d1"),
    ),
    "slow comes before nobody": (Snapshot((prefill("p0", slow=True),), (D0,)), ("p0", "d0")),
    "the pair that has waited longest": (
        Snapshot((P0, P1), (D0, D1), (), {("p0", "d0"): 4, ("p0", "d1"): 3, ("p1", "d0"): 2, ("p1", "d1"): 1}),
        ("p1", "d1"),
    ),
    "among new pairs the decode replica that has": (Snapshot((P0,), (decode("d0", 0, 1), D1)), ("p0", "d1")),
    "only warm pairs": (Snapshot((replace(P0, warm_peers=frozenset({"d1"})),), (D0, decode("d1", 9))), ("p0", "d1")),
}

LOCALS: dict[str, tuple[tuple[ReplicaView, ...], str]] = {
    "the least loaded": ((decode("a", 2), decode("b", 1, 5)), "b"),
    "then the one chosen longest ago": ((decode("a", 1, 6), decode("b", 1, 5)), "b"),
    "then the first by name": ((decode("b", 1, 5), decode("a", 1, 5)), "a"),
    "prompts that it computes come first": ((decode("a", tokens=100), decode("b", 3, 5)), "b"),
    "slow comes last": ((decode("a", slow=True), decode("b", 9, 9, 9)), "b"),
}


@pytest.mark.parametrize("case", HANDOFFS.values(), ids=HANDOFFS.keys())
def test_hand_offs(case: tuple[Snapshot, tuple[str, str]]) -> None:
    """The pair of a hand-off, by load and then by turn."""
    snapshot, expected = case
    decision = LeastLoaded().choose(PLAIN, snapshot)
    assert (decision.mode, decision.reason) == ("handoff", "")
    assert (decision.prefill_id, decision.decode_id) == expected


@pytest.mark.parametrize("case", LOCALS.values(), ids=LOCALS.keys())
def test_decode_alone(case: tuple[tuple[ReplicaView, ...], str]) -> None:
    """The decode replica of a request that is not handed off, by load and then by turn."""
    replicas, expected = case
    decision = LeastLoaded().choose(LOCAL, Snapshot((P0,), replicas))
    assert (decision.mode, decision.reason, decision.decode_id) == ("local", "short", expected)


MODES: dict[str, tuple[RequestView, Snapshot, Decision]] = {
    "no pair is warm": (
        PLAIN,
        Snapshot((replace(P0, warm_peers=frozenset()),), (D0,)),
        Decision("local", ("no_warm_pair",), None, "d0", (D0,)),
    ),
    "fanning out": (
        replace(PLAIN, ruled_out={"handoff": "n"}),
        Snapshot((P0,), (D0,)),
        Decision("primed", ("n",), "p0", "d0", (PairView(P0, D0, 0),)),
    ),
    "fanning out without a pair": (
        replace(PLAIN, ruled_out={"handoff": "n"}),
        Snapshot((), (D0,)),
        Decision("local", ("no_warm_pair",), None, "d0", (D0,)),
    ),
    "fanning out where nothing may be primed": (
        replace(PLAIN, ruled_out={"handoff": "n", "primed": "resumed"}),
        Snapshot((P0,), (D0,)),
        Decision("local", ("n",), None, "d0", (D0,)),
    ),
    "a pair or nobody": (
        replace(PLAIN, ruled_out={"local": "pair_only"}, without=frozenset({"p0", "p1"})),
        TWO_BY_TWO,
        Decision("none", ("no_warm_pair",)),
    ),
    "nobody is there": (PLAIN, Snapshot((), ()), Decision("none", ("no_warm_pair", "no_replica"))),
    "all were tried": (
        replace(LOCAL, without=frozenset({"p0", "p1", "d0", "d1"})),
        TWO_BY_TWO,
        Decision("none", ("short", "no_replica")),
    ),
    "prefill alone": (
        replace(PLAIN, without=frozenset({"d0", "d1"})),
        Snapshot((prefill("p0", 3), P1), (D0, D1)),
        Decision("prefill", ("no_warm_pair", "no_decode_replica"), "p1", None, (prefill("p0", 3), P1)),
    ),
    "prefill alone before a last resort": (
        LOCAL,
        Snapshot((P0,), (), (D0,)),
        Decision("prefill", ("short", "no_decode_replica"), "p0", None, (P0,)),
    ),
    "prefill alone within its own budget": (
        LOCAL,
        Snapshot((replace(P0, local_prefill_tokens=8),), (), max_prefill_alone_tokens=10),
        Decision("none", ("short", "no_room"), None, None, (replace(P0, local_prefill_tokens=8),)),
    ),
    "prefill never alone": (
        LOCAL,
        Snapshot((P0,), (), max_prefill_alone_tokens=0),
        Decision("none", ("short", "no_replica")),
    ),
    "one decode replica alone will do": (
        replace(LOCAL, decode_id="d1"),
        Snapshot((P0,), (D0,)),
        Decision("none", ("short", "no_replica")),
    ),
    "prefill goes on with the same model": (
        replace(LOCAL, kv_fit="a"),
        Snapshot((P0, replace(P1, kv_fit="a")), (replace(D0, kv_fit="b"),)),
        Decision("prefill", ("short", "no_decode_replica"), "p1", None, (replace(P1, kv_fit="a"),)),
    ),
    "another model only": (
        replace(LOCAL, kv_fit="a"),
        Snapshot((P0,), (replace(D0, kv_fit="b"),)),
        Decision("none", ("short", "other_kv_fit")),
    ),
    "no room": (
        LOCAL,
        Snapshot((), (decode("d0", tokens=8),), max_local_prefill_tokens=10),
        Decision("none", ("short", "no_room"), None, None, (decode("d0", tokens=8),)),
    ),
    "room for what is left": (
        LOCAL,
        Snapshot((), (decode("d0", tokens=8), decode("d1", tokens=7, last_chosen=9)), max_local_prefill_tokens=10),
        Decision("local", ("short",), None, "d1", (decode("d0", tokens=8), decode("d1", tokens=7, last_chosen=9))),
    ),
    "let in without room": (
        replace(LOCAL, needs_room=False),
        Snapshot((), (decode("d0", tokens=8),), max_local_prefill_tokens=10),
        Decision("local", ("short",), None, "d0", (decode("d0", tokens=8),)),
    ),
    "last resort": (
        LOCAL,
        Snapshot((), (), (replace(D0, draining=True), decode("d1", 9))),
        Decision("local", ("short",), None, "d1", (decode("d1", 9),)),
    ),
    "the very last resort": (
        replace(LOCAL, without=frozenset({"d1"})),
        Snapshot((), (D1,), (replace(D0, draining=True),)),
        Decision("local", ("short",), None, "d0", (replace(D0, draining=True),)),
    ),
    "last resorts take no hand-offs": (
        PLAIN,
        Snapshot((P0,), (), (D0,), max_prefill_alone_tokens=0),
        Decision("local", ("no_warm_pair",), None, "d0", (D0,)),
    ),
}


@pytest.mark.parametrize("case", MODES.values(), ids=MODES.keys())
def test_modes(case: tuple[RequestView, Snapshot, Decision]) -> None:
    """Who makes the answer, and in which words it is said why."""
    request, snapshot, expected = case
    assert LeastLoaded().choose(request, snapshot) == expected


def test_no_candidates() -> None:
    """Nothing to choose from is a decision for nobody, not an error."""
    for request in (PLAIN, LOCAL):
        decision = LeastLoaded().choose(request, Snapshot((), ()))
        assert (decision.mode, decision.refusal, decision.not_chosen) == ("none", "no_replica", ())


def test_all_pairs_take_turns() -> None:
    """Idle replicas of 2 x 2 use every pair once in four choices."""
    snapshot = TWO_BY_TWO
    chosen: list[tuple[str, str]] = []
    for at in range(1, 9):
        decision = LeastLoaded().choose(PLAIN, snapshot)
        assert decision.prefill_id is not None and decision.decode_id is not None
        chosen.append((decision.prefill_id, decision.decode_id))
        snapshot = after(snapshot, decision, at)
    assert sorted(chosen[:4]) == sorted(chosen[4:]) == [("p0", "d0"), ("p0", "d1"), ("p1", "d0"), ("p1", "d1")]


def after(snapshot: Snapshot, decision: Decision, at: int) -> Snapshot:
    """The snapshot with the decision's turn taken."""

    def turned(replicas: tuple[ReplicaView, ...], chosen: str | None) -> tuple[ReplicaView, ...]:
        return tuple(replace(r, last_chosen=at) if r.replica_id == chosen else r for r in replicas)

    pairs = dict(snapshot.pairs_chosen)
    if decision.prefill_id is not None and decision.decode_id is not None:
        pairs[decision.prefill_id, decision.decode_id] = at
    return replace(
        snapshot,
        prefill=turned(snapshot.prefill, decision.prefill_id),
        decode=turned(snapshot.decode, decision.decode_id),
        pairs_chosen=pairs,
    )


def test_who_lost() -> None:
    """A decision names all that it weighed and did not choose."""
    decision = LeastLoaded().choose(PLAIN, TWO_BY_TWO)
    assert len(decision.candidates) == 4 and len(decision.not_chosen) == 3
    assert decision.not_chosen == (PairView(P0, D1, 0), PairView(P1, D0, 0), PairView(P1, D1, 0))
    local = LeastLoaded().choose(LOCAL, TWO_BY_TWO)
    assert (local.decode_id, local.not_chosen) == ("d0", (D1,))


def test_whether_there_is_another_prefill_replica() -> None:
    """With any decode replica, or with the settled one."""
    decision = LeastLoaded().choose(PLAIN, TWO_BY_TWO)
    assert decision.has_other_prefill() and decision.has_other_prefill(decode_id="d0")
    only_d1 = replace(P1, warm_peers=frozenset({"d1"}), num_in_flight=1)
    decision = LeastLoaded().choose(PLAIN, Snapshot((P0, only_d1), (D0, D1)))
    assert decision.decode_id == "d0" and decision.has_other_prefill()
    assert not decision.has_other_prefill(decode_id="d0")
    assert not LeastLoaded().choose(PLAIN, Snapshot((P0,), (D0, D1))).has_other_prefill()
