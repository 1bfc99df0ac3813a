# SPDX-License-Identifier: Apache-2.0
"""Short forms of `make prove-serve`, on real vLLM engines under Ray Serve."""

from __future__ import annotations

from typing import Any

from tests.e2e.conftest import Expected
from tests.prove.serve_bad_input import generated, http_cases
from tests.prove.serve_leaving import leave
from tests.prove.serve_tokens import mode_of, wrong
from tests.support.stack import Stack
from tests.support.tiers import asked


def test_same_tokens_as_one_engine(real_stack: Stack, expected: Expected) -> None:
    """Every answer is the aggregated engine's, alone and four at once, while the prefill pool computed the prompts."""
    before = real_stack.stats()
    for right, num_clients in zip(expected.answers, (1, 4), strict=True):
        got = asked(real_stack.url, expected.cases, num_clients)
        assert wrong(expected.cases, right, got) == []
    after = real_stack.stats()
    assert sum(mode_of(answer) == "prefill pool" for answer in got) >= 0.8 * len(got)
    assert _sum(after["decode"], "nixl_bytes_transferred_total") > _sum(
        before["decode"], "nixl_bytes_transferred_total"
    )
    name = "prompt_tokens_computed_total"
    computed = {pool: _sum(after[pool], name) - _sum(before[pool], name) for pool in after}
    assert computed["decode"] <= 0.2 * computed["prefill"]


def _sum(replicas: list[dict[str, Any]], name: str) -> float:
    return sum(float(stats[name]) for stats in replicas)


def test_leaving_clients_leave_nothing(real_stack: Stack) -> None:
    """Clients that leave at random moments leave both engines idle within two seconds."""
    rows = leave(real_stack, 16)
    assert [row.text() for row in rows if not row.holds] == []


def test_bad_requests(real_stack: Stack) -> None:
    """Every case of the table is answered with the right status and OpenAI's error shape."""
    assert [row.text() for row in http_cases(real_stack) if not row.holds] == []


def test_generated_requests(real_stack: Stack) -> None:
    """A few hundred requests made from the OpenAPI document cause no 5xx."""
    assert [row.text() for row in generated(real_stack, 200, phases="fuzzing") if not row.holds] == []
