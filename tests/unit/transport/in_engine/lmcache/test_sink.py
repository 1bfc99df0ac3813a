# SPDX-License-Identifier: Apache-2.0
"""Which finished hand-offs the sink stores, what it pins for that, and that nothing stays pinned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.block_pool import Pool
from transport.in_engine.lmcache.sink import (
    MAX_UNDER_WAY,
    NO_ANSWER,
    NO_ROOM,
    STORE_FAILED,
    TOO_LATE,
    Rescues,
    Store,
    leading_tokens,
)
from transport.in_engine.lmcache.sink_manager import SinkActions, SinkManager

DEADLINE_S = 30.0
BLOCK_TOKENS = 128


@dataclass(frozen=True)
class Meta:
    request_id: str


class Bench:
    """A sink over a pool of `num_blocks`; what is kept for a hand-off is the list of its blocks."""

    def __init__(self, num_blocks: int = 100, num_ranks: int = 1) -> None:
        self.pool = Pool(num_blocks)
        self.healthy = True
        self.now = 0.0
        self.sink = Rescues(
            make_store=self._store,
            is_healthy=lambda: self.healthy,
            num_ranks=num_ranks,
            deadline_s=DEADLINE_S,
            clock=lambda: self.now,
            unix_time=lambda: 1000.0 + self.now,
        )
        self.sink.bind(self.pool)

    @staticmethod
    def _store(store_id: str, kept: list[int]) -> Store | None:
        if not kept:
            return None
        tokens = len(kept) * BLOCK_TOKENS
        return Store(Meta(store_id), tuple(kept), tokens, tokens * 2048, tuple(f"c{i}" for i in kept))

    def adopt(self, name: str, blocks: Iterable[int], outcome: str = "released") -> bool:
        self.sink.hold(name, f"hand-{name}", list(blocks))
        return self.sink.decide(name, outcome)  # type: ignore[arg-type]

    def submit(self) -> list[str]:
        return [meta.request_id for meta in self.sink.next_stores()]

    def outcomes(self) -> list[tuple[str, str]]:
        """(hand-off, `rescued` or the reason) of each event since the last call."""
        return [(e["id"], e.get("reason", e["kind"])) for e in self.sink.take_events()]


def test_a_consumed_hand_off_costs_a_dictionary_entry() -> None:
    """Nothing is pinned, stored or kept of what a decode engine has read."""
    bench = Bench()
    assert not bench.adopt("a", [1, 2], "consumed")
    assert bench.sink.num_held == 0 and bench.sink.num_pinned_blocks == 0 and not bench.sink.has_work()
    assert bench.submit() == [] and bench.outcomes() == []


@pytest.mark.parametrize("outcome", ["released", "expired"])
def test_an_unused_hand_off_is_stored(outcome: str) -> None:
    """Its blocks are pinned from the decision to the report, and the event says what was stored."""
    bench = Bench()
    assert bench.adopt("a", [3, 4], outcome)
    assert bench.pool.pinned() == [3, 4] and bench.sink.has_work()
    [store_id] = bench.submit()
    assert bench.sink.report((), {store_id: 1}) == [store_id]
    assert bench.pool.pinned() == [] and not bench.sink.has_work()
    assert bench.sink.take_events() == [
        {
            "kind": "rescued",
            "at": 1000.0,
            "id": "hand-a",
            "tokens": 256,
            "bytes": 256 * 2048,
            "chunks": ["c3", "c4"],
        }
    ]


def test_always_stores_what_was_consumed_too() -> None:
    """The client's wish overrides the sink's own choice."""
    bench = Bench()
    bench.sink.hold("a", "hand-a", [1], always=True)
    assert bench.sink.decide("a", "consumed")


def test_nothing_to_store_is_not_adopted() -> None:
    """A prompt shorter than a chunk, or one that the tier has already, ends as it ended."""
    bench = Bench()
    assert not bench.adopt("a", [])
    assert not bench.sink.decide("never-held", "expired")
    assert bench.outcomes() == []


def test_every_rank_must_report() -> None:
    """With three ranks the blocks stay pinned until the third report, in whatever portions they come."""
    bench = Bench(num_ranks=3)
    bench.adopt("a", [1])
    [store_id] = bench.submit()
    assert bench.sink.report((), {store_id: 1}) == []
    assert bench.pool.pinned() == [1]
    assert bench.sink.report((), {store_id: 2}) == [store_id]
    assert bench.pool.pinned() == [] and bench.outcomes() == [("hand-a", "rescued")]


def test_one_failed_rank_fails_the_rescue_after_the_last_report() -> None:
    """The other ranks may still be reading the blocks, and a chunk without one rank's share is no chunk."""
    bench = Bench(num_ranks=2)
    bench.adopt("a", [1])
    [store_id] = bench.submit()
    assert bench.sink.report({store_id}, {store_id: 1}) == []
    assert bench.pool.pinned() == [1]
    bench.sink.report((), {store_id: 1})
    assert bench.pool.pinned() == [] and bench.outcomes() == [("hand-a", STORE_FAILED)]


def test_a_dead_tier_pins_nothing() -> None:
    """Without an answering server a hand-off is lost at once, and so are those that wait for their turn."""
    bench = Bench()
    bench.adopt("queued", [1])
    bench.healthy = False
    assert bench.adopt("late", [2])
    assert bench.pool.pinned() == [1]
    assert bench.submit() == []
    assert bench.pool.pinned() == []
    assert bench.outcomes() == [("hand-late", NO_ANSWER), ("hand-queued", NO_ANSWER)]


def test_nothing_stays_pinned_for_ever() -> None:
    """A store that is never reported is given up, and its late report changes nothing."""
    bench = Bench()
    bench.adopt("a", [1])
    bench.now = DEADLINE_S - 1
    [store_id] = bench.submit()
    bench.now += DEADLINE_S - 1
    bench.submit()
    assert bench.pool.pinned() == [1], "the time under way is counted from the submission"
    bench.now += 1
    bench.submit()
    assert bench.pool.pinned() == [] and bench.outcomes() == [("hand-a", TOO_LATE)]
    assert bench.sink.report((), {store_id: 1}) == [] and bench.outcomes() == []


def test_what_waits_too_long_is_given_up() -> None:
    """Stores ahead that are never reported do not keep those behind them pinned."""
    bench = Bench(num_blocks=1000)
    for i in range(MAX_UNDER_WAY + 1):
        bench.adopt(f"r{i}", [i])
    for _ in range(MAX_UNDER_WAY):
        assert len(bench.submit()) == 1
    assert bench.submit() == []
    bench.now = DEADLINE_S
    bench.submit()
    assert bench.pool.pinned() == [] and len(bench.outcomes()) == MAX_UNDER_WAY + 1


def test_at_most_a_quarter_of_the_blocks_is_pinned() -> None:
    """The oldest that was not submitted makes room; one that is being read does not, and one too large never fits."""
    bench = Bench(num_blocks=40)
    bench.adopt("read", [0, 1, 2])
    bench.submit()
    bench.adopt("old", [3, 4, 5])
    bench.adopt("mid", [6, 7, 8])
    assert bench.adopt("new", [9, 10, 11])
    assert bench.outcomes() == [("hand-old", NO_ROOM)]
    assert bench.sink.num_pinned_blocks == 9 <= 40 // 4
    assert bench.adopt("large", range(20, 31))
    assert bench.outcomes() == [("hand-large", NO_ROOM)]
    assert bench.pool.pinned() == [0, 1, 2, 6, 7, 8, 9, 10, 11], "one that cannot fit costs the others nothing"


def test_shared_blocks_are_pinned_once_for_each_rescue() -> None:
    """Two hand-offs with a common prefix pin its blocks twice and free them twice."""
    bench = Bench()
    bench.adopt("a", [1, 2])
    bench.adopt("b", [1, 3])
    [first] = bench.submit()
    bench.sink.report((), {first: 1})
    assert bench.pool.pinned() == [1, 3]
    [second] = bench.submit()
    bench.sink.report((), {second: 1})
    assert bench.pool.pinned() == []


def test_an_id_used_anew_does_not_meet_its_past() -> None:
    """A request with the id of a held one is a new request, and stores of both have ids of their own."""
    bench = Bench()
    bench.sink.hold("a", "hand-1", [1])
    bench.sink.forget("a")
    assert not bench.sink.decide("a", "expired")
    bench.adopt("a", [1])
    [first] = bench.submit()
    bench.adopt("a", [2])
    [second] = bench.submit()
    assert first != second and "a" not in (first, second)
    bench.sink.report((), {first: 1})
    assert bench.pool.pinned() == [2]


class OwnManager:
    """LMCache's manager, which notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> SinkActions:
            self.calls.append((name, *args))
            return SinkActions(stores_to_submit=["own"] if name == "on_scheduler_step" else [])

        return call

    def has_inflight_store_work(self) -> bool:
        return False


def test_manager_alone_keeps_the_engine_stepping_while_blocks_are_pinned() -> None:
    """A queued store goes out on any step, so an idle engine must step for it, and stops when it is done."""
    bench = Bench()
    manager = SinkManager(bench.sink)
    assert not manager.has_inflight_store_work()
    bench.adopt("a", [1])
    assert manager.has_inflight_store_work()
    [meta] = manager.on_scheduler_step(None).stores_to_submit
    done = manager.on_store_results(set(), {meta.request_id: 1, "unknown": 1})
    assert done.sessions_to_end == [meta.request_id]
    assert not manager.has_inflight_store_work()
    assert manager.on_request_finished("b").sessions_to_end == ["b"]


def test_manager_beside_lmcaches_own_keeps_their_reports_apart() -> None:
    """With `evicted` both store on one step, and each hears of its own stores only."""
    bench, own = Bench(), OwnManager()
    manager = SinkManager(bench.sink, own)
    bench.adopt("a", [1])
    stores = manager.on_scheduler_step("step").stores_to_submit
    assert stores[0] == "own" and len(stores) == 2
    ours = stores[1].request_id
    manager.on_store_results({ours, "b"}, {ours: 1, "b": 1})
    assert ("on_store_results", {"b"}, {"b": 1}) in own.calls
    assert bench.outcomes() == [("hand-a", STORE_FAILED)]


def test_manager_forgets_a_hold_when_its_id_returns() -> None:
    """LMCache says so when a request was preempted or a new one took the id."""
    for call in ("on_request_reset", "on_request_arrived"):
        bench = Bench()
        bench.sink.hold("a", "hand-a", [1])
        getattr(SinkManager(bench.sink), call)("a")
        assert bench.sink.num_held == 0


@pytest.mark.parametrize(
    ("block_ids", "group_tokens", "end"),
    [
        ([[1, 2, 3, 4]], [4], 24),
        ([[1, 2, 0, 4]], [4], 16),
        ([[0, 2, 3, 4]], [4], 8),
        ([[1, 2, 3]], [4], 16),
        ([[]], [4], 8),
        ([[1, 2, 3, 4], [5, 6]], [4, 8], 24),
        ([[1, 2, 3, 4], [5, 0]], [4, 8], 16),
        ([[1, 2, 3, 4], []], [4, 0], 24),
    ],
)
def test_what_lacks_a_block_is_not_stored(block_ids: list[list[int]], group_tokens: list[int], end: int) -> None:
    """Two chunks of eight tokens from token 8 on; block 0 stands where vLLM has taken one away."""
    assert leading_tokens(block_ids, group_tokens, 8, 24, 8) == end
