# SPDX-License-Identifier: Apache-2.0
"""Who gets the next request, by turns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disagg.routing.round_robin import RoundRobin
from disagg.routing.views import ReplicaView, Snapshot
from tests.unit.disagg.routing.test_least_loaded import D0, D1, LOCAL, P0, P1, PLAIN, after, decode, prefill

HANDOFFS: dict[str, tuple[Snapshot, tuple[str, str]]] = {
    "load does not count": (
        Snapshot(
            (prefill("p0", 9), P1), (decode("d0", 9), D1), (), {("p1", "d1"): 2, ("p0", "d1"): 1, ("p1", "d0"): 3}
        ),
        ("p0", "d0"),
    ),
    "the pair that was chosen longest ago": (
        Snapshot((P0, P1), (D0, D1), (), {("p0", "d0"): 4, ("p0", "d1"): 3, ("p1", "d0"): 1, ("p1", "d1"): 2}),
        ("p1", "d0"),
    ),
    "slow comes last": (Snapshot((prefill("p0", slow=True), prefill("p1", 9, 9)), (D0,)), ("p1", "d0")),
    "slow comes before nobody": (Snapshot((prefill("p0", slow=True),), (D0,)), ("p0", "d0")),
}

LOCALS: dict[str, tuple[tuple[ReplicaView, ...], str]] = {
    "load does not count": ((decode("a", 9, 1, 99), decode("b", 0, 2)), "a"),
    "then the first by name": ((decode("b", 0, 5), decode("a", 1, 5)), "a"),
    "slow comes last": ((decode("a", slow=True), decode("b", 9, 9, 9)), "b"),
}


@pytest.mark.parametrize("case", HANDOFFS.values(), ids=HANDOFFS.keys())
def test_hand_offs(case: tuple[Snapshot, tuple[str, str]]) -> None:
    """The pair of a hand-off, by turn alone."""
    snapshot, expected = case
    decision = RoundRobin().choose(PLAIN, snapshot)
    assert (decision.mode, decision.prefill_id, decision.decode_id) == ("handoff", *expected)


@pytest.mark.parametrize("case", LOCALS.values(), ids=LOCALS.keys())
def test_decode_alone(case: tuple[tuple[ReplicaView, ...], str]) -> None:
    """The decode replica of a request that is not handed off, by turn alone."""
    replicas, expected = case
    decision = RoundRobin().choose(LOCAL, Snapshot((), replicas))
    assert (decision.mode, decision.decode_id) == ("local", expected)


def test_turns_go_over_pairs_and_change_both_sides() -> None:
    """2 x 2 use every pair once in four choices, and two in a row share no replica while both are new."""
    snapshot = Snapshot((P0, P1), (D0, D1))
    chosen: list[tuple[str | None, str | None]] = []
    for at in range(1, 9):
        decision = RoundRobin().choose(PLAIN, snapshot)
        chosen.append((decision.prefill_id, decision.decode_id))
        snapshot = after(snapshot, decision, at)
    assert chosen[:2] == [("p0", "d0"), ("p1", "d1")]
    assert chosen[4:] == chosen[:4] and len(set(chosen)) == 4


def test_room_counts_all_the_same() -> None:
    """A policy orders who may be chosen; it lets in nobody else."""
    snapshot = Snapshot((), (decode("a", tokens=9), decode("b", 0, 7)), max_local_prefill_tokens=10)
    assert RoundRobin().choose(LOCAL, snapshot).decode_id == "b"
    assert RoundRobin().choose(replace(LOCAL, without=frozenset("b")), snapshot).refusal == "no_room"
