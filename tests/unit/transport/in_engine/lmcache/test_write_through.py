# SPDX-License-Identifier: Apache-2.0
"""Each chunk of a prompt is a store of its own, and nothing stays pinned."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.block_pool import Pool
from transport.in_engine.lmcache.sink import Rescues
from transport.in_engine.lmcache.sink_manager import SinkManager
from transport.in_engine.lmcache.write_through import WriteThrough

DEADLINE_S = 30.0


@dataclass(frozen=True)
class Candidate:
    """LMCache's metadata; `blocks` stands for the operation."""

    request_id: str
    blocks: tuple[int, ...]


class Bench:
    """The manager as LMCache's connector calls it, over a pool of `num_blocks`."""

    def __init__(self, num_blocks: int = 100, num_ranks: int = 1) -> None:
        self.pool = Pool(num_blocks)
        self.healthy = True
        self.now = 0.0
        given: dict[str, Any] = {
            "is_healthy": lambda: self.healthy,
            "num_ranks": num_ranks,
            "deadline_s": DEADLINE_S,
            "clock": lambda: self.now,
        }
        self.through = WriteThrough(make_store=self._make, **given)
        self.manager = SinkManager(Rescues(make_store=lambda *_: None, **given), through=self.through)
        self.manager.bind_block_pool(self.pool)

    @staticmethod
    def _make(store_id: str, candidate: Candidate) -> tuple[Any, tuple[int, ...]] | None:
        return (SimpleNamespace(request_id=store_id), candidate.blocks) if candidate.blocks else None

    def step(self, *candidates: Candidate) -> list[str]:
        """One scheduler step; the ids of the stores that go out with it."""
        for candidate in candidates:
            self.manager.add_store_candidate(candidate)
        return [meta.request_id for meta in self.manager.on_scheduler_step(None).stores_to_submit]


def test_chunks_of_one_request_are_stores_of_their_own() -> None:
    """All go out in their own step, none under the request's id, and the request's end changes nothing."""
    bench = Bench()
    first, second = bench.step(Candidate("r", (1, 2)), Candidate("r", (3,)))
    (third,) = bench.step(Candidate("r", (4,)))
    assert {i.split("/")[0] for i in (first, second, third)} == {"r"} and len({first, second, third, "r"}) == 4
    assert bench.pool.pinned() == [1, 2, 3, 4]
    assert bench.manager.on_request_finished("r").sessions_to_end == ["r"]
    assert bench.pool.pinned() == [1, 2, 3, 4] and bench.manager.has_inflight_store_work()
    done = bench.manager.on_store_results({second}, {first: 1, second: 1, "r": 1})
    assert done.sessions_to_end == [first, second]
    assert bench.pool.pinned() == [4]
    bench.manager.on_request_reset("r")
    bench.manager.on_store_results(set(), {third: 1})
    assert bench.pool.pinned() == [] and not bench.manager.has_inflight_store_work()
    assert bench.through.num_dropped == 0


def test_blocks_are_pinned_before_the_metadata_leaves() -> None:
    """vLLM may free them as soon as the step is scheduled."""
    bench = Bench()
    bench.manager.add_store_candidate(Candidate("r", (7,)))
    assert bench.pool.pinned() == [7]
    assert len(bench.step()) == 1 and bench.step() == []


def test_every_rank_must_report() -> None:
    """The blocks stay until the last rank has read them."""
    bench = Bench(num_ranks=2)
    (store_id,) = bench.step(Candidate("r", (1,)))
    assert bench.manager.on_store_results(set(), {store_id: 1}).sessions_to_end == []
    assert bench.pool.pinned() == [1]
    assert bench.manager.on_store_results(set(), {store_id: 1}).sessions_to_end == [store_id]
    assert bench.pool.pinned() == []


def test_a_store_that_nobody_reports_is_given_up() -> None:
    """Each has its own time, and a late report frees nothing twice."""
    bench = Bench()
    (old,) = bench.step(Candidate("a", (1,)))
    bench.now = DEADLINE_S - 1
    bench.step(Candidate("b", (1, 2)))
    bench.now = DEADLINE_S
    bench.step()
    assert bench.pool.pinned() == [1, 2]
    bench.manager.on_store_results(set(), {old: 1})
    assert bench.pool.pinned() == [1, 2]


def test_what_does_not_fit_is_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """At most half of the blocks, but always one store; logged once, and in all at the end."""
    caplog.set_level(logging.WARNING)
    bench = Bench(num_blocks=10)
    (large,) = bench.step(Candidate("large", (1, 2, 3, 4, 5, 6, 7)))
    assert bench.step(Candidate("a", (8,)), Candidate("b", (9,))) == []
    assert bench.through.num_dropped == 2 and len(caplog.records) == 1
    bench.manager.on_store_results(set(), {large: 1})
    assert len(bench.step(*(Candidate(f"r{i}", (i,)) for i in range(6)))) == 5
    bench.manager.log_final_stats()
    assert caplog.records[-1].getMessage().startswith("3 stores")


def test_a_lost_server_pins_nothing() -> None:
    """A store that would only fail is not made."""
    bench = Bench()
    bench.healthy = False
    assert bench.step(Candidate("r", (1,))) == []
    assert bench.pool.pinned() == [] and bench.through.num_dropped == 1


def test_nothing_to_store_is_no_drop() -> None:
    """Chunks whose blocks are gone are left out before."""
    bench = Bench()
    assert bench.step(Candidate("r", ())) == []
    assert bench.through.num_dropped == 0 and not bench.manager.has_inflight_store_work()
