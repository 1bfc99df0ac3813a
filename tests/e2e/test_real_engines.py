# SPDX-License-Identifier: Apache-2.0
"""Short forms of `make prove-serve`, on real vLLM engines under Ray Serve."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.prove.serve_bad_input import generated, http_cases
from tests.prove.serve_leaving import leave
from tests.prove.serve_tokens import mode_of, wrong
from tests.support.answers import Answer, Case, ask_all, cases
from tests.support.stack import Stack, aggregated_engine
from tests.support.tiers import FLOAT32

EVERY = 5


@pytest.fixture(scope="module")
def chosen() -> list[Case]:
    """Every fifth case of the request set, and all that are special only once."""
    return [case for i, case in enumerate(cases()) if i % EVERY == 0]


@pytest.fixture(scope="module")
def expected(chosen: list[Case]) -> list[list[Answer]]:
    """An aggregated engine's answers, alone and four at once."""
    with aggregated_engine(name="e2e-aggregated", engine_kwargs=FLOAT32) as url:
        return [asyncio.run(ask_all(url, chosen, num_clients=n)) for n in (1, 4)]


def test_same_tokens_as_one_engine(expected: list[list[Answer]], chosen: list[Case], real_stack: Stack) -> None:
    """Every answer is the aggregated engine's, alone and four at once, while the prefill pool computed the prompts."""
    before = real_stack.stats()
    for right, num_clients in zip(expected, (1, 4), strict=True):
        got = asyncio.run(ask_all(real_stack.url, chosen, num_clients=num_clients))
        assert wrong(chosen, right, got) == []
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
