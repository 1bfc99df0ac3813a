# SPDX-License-Identifier: Apache-2.0
"""Short forms of `make prove-tiers`, on real vLLM engines, NIXL, Mooncake and LMCache under Ray Serve."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from tests.prove.tiers_durable import two_lives
from tests.prove.tiers_mooncake import in_time, requests, timed
from tests.prove.tiers_server import server_process
from tests.prove.tiers_storm import storm
from tests.prove.tiers_tokens import found_in
from tests.support.answers import Answer, Case
from tests.support.durable import DURABLE_FILES, durable_application
from tests.support.slot import Slot
from tests.support.stack import BUILD, Stack, wait_until
from tests.support.tiers import (
    FLOAT32,
    asked,
    balanced,
    books,
    case_of,
    events,
    orphan,
    prompts,
    replica_urls,
    reset_caches,
    settled_books,
    steady,
    wrong,
)

Reference = tuple[list[Case], list[Answer]]


@pytest.fixture(scope="session")
def reference() -> Reference:
    """A few prompts and an aggregated engine's answers."""
    chosen, expected = steady(
        [case_of(f"p{i}", p) for i, p in enumerate(prompts(12, seed=91))], 6, engine_kwargs=FLOAT32
    )
    assert len(chosen) == 6
    return chosen, expected


class TestNixl:
    """Host memory, LMCache and the sink `unused`."""

    def test_same_tokens_from_every_tier(self, reference: Reference, nixl_stack: Stack) -> None:
        """The aggregated engine's tokens, computed, from host memory, and after a rescue."""
        chosen, expected = reference
        assert wrong(expected, asked(nixl_stack.url, chosen)) == []
        orphan(nixl_stack, [case.body["prompt"] for case in chosen])
        reset_caches(nixl_stack)
        before = found_in(nixl_stack)
        assert wrong(expected, asked(nixl_stack.url, chosen)) == []
        after = found_in(nixl_stack)
        assert sum(after.values()) > sum(before.values())

    def test_a_storm_of_leaving_clients(self, nixl_stack: Stack) -> None:
        assert [row.text() for row in storm(nixl_stack, "nixl", 24) if not row.holds] == []

    def test_a_killed_lmcache_server_costs_no_request(self, reference: Reference, nixl_stack: Stack) -> None:
        """Every answer is right while it is down, it comes back, and rescues reach it again."""
        chosen, expected = reference
        [url] = replica_urls(nixl_stack, "prefill")
        old = server_process(nixl_stack).pid
        os.kill(old, signal.SIGKILL)
        salted = [Case(c.name, c.path, {**c.body, "cache_salt": "killed"}) for c in chosen]
        assert wrong(expected, asked(nixl_stack.url, salted, 4)) == []

        def rescued_again() -> bool:
            if _server_pid(nixl_stack) in (None, old):
                return False
            try:
                orphan(nixl_stack, prompts(1, seed=92, shortest=600), timeout_s=4)
            except TimeoutError:
                return False
            return True

        wait_until(rescued_again, 60, "a rescue reaches the new LMCache server", 0.5)
        assert any(e["kind"] == "rescued" for e in events(url))
        totals = settled_books(nixl_stack)
        assert balanced(totals), totals


class TestMooncake:
    """Mooncake over TCP, LMCache with the sink `write_through`."""

    def test_same_tokens_from_lmcache(self, reference: Reference, mooncake_stack: Stack) -> None:
        chosen, expected = reference
        assert wrong(expected, asked(mooncake_stack.url, chosen)) == []
        reset_caches(mooncake_stack)
        before = found_in(mooncake_stack)["LMCache"]
        assert wrong(expected, asked(mooncake_stack.url, chosen)) == []
        assert found_in(mooncake_stack)["LMCache"] > before
        assert books(mooncake_stack)["consumed"] >= 2 * len(chosen)

    def test_answers_of_one_token_do_not_wait(self, mooncake_stack: Stack) -> None:
        chosen = requests(30)
        early, _, limit = in_time(chosen, timed(mooncake_stack.url, chosen))
        assert max(early) <= limit

    def test_a_storm_of_leaving_clients(self, mooncake_stack: Stack) -> None:
        assert [row.text() for row in storm(mooncake_stack, "mooncake", 24) if not row.holds] == []

    def test_the_second_life_serves_the_first_ones_prompts(
        self, reference: Reference, mooncake_stack: Stack, slot: Slot
    ) -> None:
        """From files behind LMCache, after everything was ended and started again. The last test of the first life."""
        rows = two_lives("fs", nullcontext(mooncake_stack), second_life(slot), *reference)
        assert [row.text() for row in rows if not row.holds] == []


@contextmanager
def second_life(slot: Slot) -> Iterator[Stack]:
    """The application once more, over the files of its first life."""
    slot.empty()
    with durable_application(str(BUILD / DURABLE_FILES)) as stack:
        yield stack


def _server_pid(stack: Stack) -> int | None:
    try:
        return server_process(stack).pid
    except LookupError:
        return None
