# SPDX-License-Identifier: Apache-2.0
"""Short forms of `make prove-tiers`, on real vLLM engines, NIXL, Mooncake and LMCache under Ray Serve."""

from __future__ import annotations

import os
import signal

from tests.e2e.conftest import Expected
from tests.prove.tiers_mooncake import in_time, requests, timed
from tests.prove.tiers_server import server_process
from tests.prove.tiers_storm import storm
from tests.prove.tiers_tokens import found_in
from tests.support.answers import Case
from tests.support.stack import Stack, wait_until
from tests.support.tiers import (
    asked,
    balanced,
    books,
    events,
    orphan,
    prompts,
    replica_urls,
    reset_caches,
    settled_books,
    wrong,
)


class TestNixl:
    """Host memory, LMCache and the sink `unused`."""

    def test_same_tokens_from_every_tier(self, real_stack: Stack, expected: Expected) -> None:
        """The aggregated engine's tokens, computed, from host memory, and after a rescue."""
        chosen, answers = expected.tiers
        assert wrong(answers, asked(real_stack.url, chosen)) == []
        orphan(real_stack, [case.body["prompt"] for case in chosen])
        reset_caches(real_stack)
        before = found_in(real_stack)
        assert wrong(answers, asked(real_stack.url, chosen)) == []
        after = found_in(real_stack)
        assert sum(after.values()) > sum(before.values())

    def test_a_storm_of_leaving_clients(self, real_stack: Stack) -> None:
        """Clients that leave at random moments leave no KV held, and books that balance."""
        assert [row.text() for row in storm(real_stack, "nixl", 24) if not row.holds] == []

    def test_a_killed_lmcache_server_costs_no_request(self, real_stack: Stack, expected: Expected) -> None:
        """Every answer is right while it is down, it comes back, and rescues reach it again."""
        chosen, answers = expected.tiers
        [url] = replica_urls(real_stack, "prefill")
        old = server_process(real_stack).pid
        os.kill(old, signal.SIGKILL)
        assert wrong(answers, asked(real_stack.url, salted(chosen, "killed"), 4)) == []

        def rescued_again() -> bool:
            if _server_pid(real_stack) in (None, old):
                return False
            try:
                orphan(real_stack, prompts(1, seed=92, shortest=600), timeout_s=4)
            except TimeoutError:
                return False
            return True

        wait_until(rescued_again, 60, "a rescue reaches the new LMCache server", 0.5)
        assert any(e["kind"] == "rescued" for e in events(url))
        totals = settled_books(real_stack)
        assert balanced(totals), totals


class TestMooncake:
    """Mooncake over TCP, LMCache with the sink `write_through`."""

    def test_same_tokens_from_lmcache(self, mooncake_stack: Stack, expected: Expected) -> None:
        """Computed, because its files are of other owners, and then from LMCache."""
        chosen, answers = salted(expected.tiers[0], "mooncake"), expected.tiers[1]
        assert wrong(answers, asked(mooncake_stack.url, chosen)) == []
        reset_caches(mooncake_stack)
        before = found_in(mooncake_stack)["LMCache"]
        assert wrong(answers, asked(mooncake_stack.url, chosen)) == []
        assert found_in(mooncake_stack)["LMCache"] > before
        assert books(mooncake_stack)["consumed"] >= 2 * len(chosen)

    def test_answers_of_one_token_do_not_wait(self, mooncake_stack: Stack) -> None:
        """The last token of a prompt comes as soon as its KV is there."""
        chosen = requests(30)
        early, _, limit = in_time(chosen, timed(mooncake_stack.url, chosen))
        assert max(early) <= limit

    def test_a_storm_of_leaving_clients(self, mooncake_stack: Stack) -> None:
        """As over NIXL."""
        assert [row.text() for row in storm(mooncake_stack, "mooncake", 24) if not row.holds] == []


def salted(chosen: list[Case], salt: str) -> list[Case]:
    """The same requests, of another owner: nothing of them is cached."""
    return [Case(case.name, case.path, {**case.body, "cache_salt": salt}) for case in chosen]


def _server_pid(stack: Stack) -> int | None:
    try:
        return server_process(stack).pid
    except LookupError:
        return None
