# SPDX-License-Identifier: Apache-2.0
"""Who gets the next request."""

from __future__ import annotations

from collections import Counter

from disagg.routing.least_loaded import choose_decode, choose_pair
from disagg.routing.views import PairView, ReplicaView


def _pairs(num_prefill: int, num_decode: int) -> list[PairView]:
    return [
        PairView(ReplicaView(f"p{i}", 0, 0), ReplicaView(f"d{j}", 0, 0), 0)
        for i in range(num_prefill)
        for j in range(num_decode)
    ]


def test_no_candidates() -> None:
    """Nothing to choose from is None, not an error."""
    assert choose_pair([]) is None
    assert choose_decode([]) is None


def test_prefill_load_comes_first() -> None:
    """A free prefill replica wins over a free decode replica."""
    busy_prefill = PairView(ReplicaView("p0", 1, 0), ReplicaView("d0", 0, 0), 0)
    busy_decode = PairView(ReplicaView("p1", 0, 9), ReplicaView("d1", 7, 9), 9)
    assert choose_pair([busy_prefill, busy_decode]) is busy_decode


def test_decode_load_comes_second() -> None:
    """Among equal prefill replicas the free decode replica wins."""
    busy = PairView(ReplicaView("p0", 2, 0), ReplicaView("d0", 3, 0), 0)
    free = PairView(ReplicaView("p0", 2, 9), ReplicaView("d1", 2, 9), 9)
    assert choose_pair([busy, free]) is free


def test_all_pairs_take_turns() -> None:
    """Idle replicas of 2 x 2 use every pair once in four choices."""
    last_chosen = {(p.prefill.replica_id, p.decode.replica_id): 0 for p in _pairs(2, 2)}
    replica_chosen: Counter[str] = Counter()
    for at in range(1, 9):
        views = [
            PairView(ReplicaView(p, 0, replica_chosen[p]), ReplicaView(d, 0, replica_chosen[d]), last)
            for (p, d), last in last_chosen.items()
        ]
        chosen = choose_pair(views)
        assert chosen is not None
        key = (chosen.prefill.replica_id, chosen.decode.replica_id)
        last_chosen[key] = replica_chosen[key[0]] = replica_chosen[key[1]] = at
    assert sorted(last_chosen.values()) == [5, 6, 7, 8]


def test_decode_by_load_then_age_then_name() -> None:
    """The least loaded replica, then the one chosen longest ago, then the first by name."""
    assert choose_decode([ReplicaView("a", 2, 0), ReplicaView("b", 1, 5)]) == ReplicaView("b", 1, 5)
    assert choose_decode([ReplicaView("a", 1, 6), ReplicaView("b", 1, 5)]) == ReplicaView("b", 1, 5)
    assert choose_decode([ReplicaView("b", 1, 5), ReplicaView("a", 1, 5)]) == ReplicaView("a", 1, 5)
    computing = ReplicaView("a", 0, 0, local_prefill_tokens=100)
    assert choose_decode([computing, ReplicaView("b", 3, 5)]) == ReplicaView("b", 3, 5)
