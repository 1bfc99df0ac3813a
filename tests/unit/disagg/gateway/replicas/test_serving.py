# SPDX-License-Identifier: Apache-2.0
"""The table of states: of replicas, of pools and of the application."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from disagg.gateway.replicas.serving import (
    SERVING,
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


@dataclass(frozen=True)
class Known:
    """Facts of one replica with which nothing is wrong."""

    reachable: bool = True
    quarantined: str | None = None
    draining: bool = False
    on_probation: bool = False
    slow: bool = False


REPLICAS: dict[str, tuple[Known, bool, Standing]] = {
    "well": (Known(), True, Standing("routable")),
    "slow": (Known(slow=True), True, Standing("slow")),
    "no KV has moved": (Known(), False, Standing("warming")),
    "no KV has moved, and slow": (Known(slow=True), False, Standing("warming")),
    "on probation": (Known(on_probation=True), True, Standing("warming", "crash_loop")),
    "on probation, no KV has moved": (Known(on_probation=True), False, Standing("warming", "crash_loop")),
    "leaves": (Known(draining=True, on_probation=True), True, Standing("draining")),
    "takes no connections": (Known(reachable=False, draining=True), True, Standing("unreachable")),
    "hangs": (Known(reachable=False, quarantined="hang", draining=True), True, Standing("quarantined", "hang")),
}

EVERY = [
    Known(*facts)
    for facts in itertools.product([True, False], [None, "hang"], [True, False], [True, False], [True, False])
]


@pytest.mark.parametrize("case", REPLICAS.values(), ids=REPLICAS.keys())
def test_states_of_replicas(case: tuple[Known, bool, Standing]) -> None:
    """What is worst decides, and the reason is that of the state."""
    facts, warm, expected = case
    assert replica_standing(facts, warm=warm) == expected


def test_who_may_serve_is_who_is_in_a_state_that_serves() -> None:
    """Routing and what is told of a replica never differ, whatever is known of it."""
    assert len(EVERY) == 32
    for facts in EVERY:
        assert may_serve(facts) == (replica_standing(facts, warm=True).state in SERVING)
        assert may_serve(facts) == (is_well(facts) and not facts.on_probation)


def test_last_resorts() -> None:
    """A decode replica that leaves finishes what it is given unless it hangs or cannot be reached."""
    assert may_finish(Known(draining=True)) and not may_serve(Known(draining=True))
    assert not may_finish(Known(reachable=False)) and not may_finish(Known(quarantined="hang"))


def test_who_may_be_warmed() -> None:
    """Neither of a pair may hang or leave; one that cannot be reached, is slow or on probation is tried."""
    for other in (Known(reachable=False), Known(slow=True), Known(on_probation=True)):
        assert may_be_warmed(Known(), other) and may_be_warmed(other, Known())
    for other in (Known(quarantined="hang"), Known(draining=True)):
        assert not may_be_warmed(Known(), other) and not may_be_warmed(other, Known())


POOLS: dict[str, tuple[list[Standing], Standing, int]] = {
    "empty": ([], Standing("empty"), 0),
    "the best counts": ([Standing("quarantined", "hang"), Standing("routable")], Standing("routable"), 1),
    "slow ones serve": ([Standing("warming"), Standing("slow")], Standing("slow"), 1),
    "warming serves soonest": (
        [Standing("unreachable"), Standing("warming"), Standing("draining")],
        Standing("warming"),
        0,
    ),
    "a reason is told": (
        [Standing("warming"), Standing("warming", "crash_loop")],
        Standing("warming", "crash_loop"),
        0,
    ),
    "all hang": ([Standing("quarantined", "hang")] * 2, Standing("quarantined", "hang"), 0),
}


@pytest.mark.parametrize("case", POOLS.values(), ids=POOLS.keys())
def test_states_of_pools(case: tuple[list[Standing], Standing, int]) -> None:
    """A pool is as good as its best replica."""
    replicas, expected, serving = case
    assert (pool_standing(replicas), num_serving(replicas)) == (expected, serving)


def test_states_of_the_application() -> None:
    """It is `ok` with a pair, `degraded` with one pool alone, and says which pool keeps it from being better."""
    well, hangs = Standing("routable"), Standing("quarantined", "hang")
    assert application(prefill=well, decode=well, any_pair=True, any_decode=True, any_prefill=True) == Application("ok")
    alone = application(prefill=hangs, decode=well, any_pair=False, any_decode=True, any_prefill=True)
    assert alone == Application("degraded", "the prefill pool is quarantined (hang); decode replicas serve alone")
    cold = application(prefill=well, decode=well, any_pair=False, any_decode=True, any_prefill=True)
    assert (cold.status, cold.reason) == (
        "degraded",
        "no pair of replicas has moved KV yet; decode replicas serve alone",
    )
    dark = application(prefill=well, decode=hangs, any_pair=False, any_decode=False, any_prefill=False)
    assert dark == Application("unavailable", "the decode pool is quarantined (hang)")
    other = application(prefill=well, decode=hangs, any_pair=False, any_decode=False, any_prefill=True)
    assert other == Application("degraded", "the decode pool is quarantined (hang); prefill replicas serve alone")
