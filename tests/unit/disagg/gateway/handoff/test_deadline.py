# SPDX-License-Identifier: Apache-2.0
"""How long the prefill side of a request may take."""

from __future__ import annotations

import pytest

from disagg.gateway.handoff.deadline import LocalRate, attempt_until, prefill_allowance_s


@pytest.mark.parametrize(
    ("num_tokens", "timeout_s", "rate", "allowed"),
    [
        (1000, 120, None, 15),
        (1000, 120, 100, 20),
        (1000, 120, 1000, 29),
        (1500, 120, 100, 15),
        (2500, 120, 100, 25),
        (9000, 120, 100, 90),
        (90_000, 120, 100, 120),
        (1000, 5, 100, 5),
        (1000, 5, None, 5),
    ],
    ids=[
        "no rate is half the target",
        "the expected local prefill is kept back",
        "a fast decode leaves nearly all",
        "half of the target each",
        "a long prompt gets what decode would take",
        "also beyond the target",
        "but never more than the timeout",
        "the timeout binds",
        "also without a rate",
    ],
)
def test_allowance(num_tokens: int, timeout_s: float, rate: float | None, allowed: float) -> None:
    """Target 30 s, by prompt length, timeout and measured rate."""
    got = prefill_allowance_s(num_tokens, prefill_timeout_s=timeout_s, first_token_target_s=30, local_tokens_per_s=rate)
    assert got == pytest.approx(allowed)


def test_an_attempt_gets_half_while_there_is_another() -> None:
    """The last replica gets all that is left, and nothing becomes negative."""
    assert attempt_until(100, 110, another=True) == 105
    assert attempt_until(100, 110, another=False) == 110
    assert attempt_until(100, 90, another=True) == 100


def test_the_rate_is_a_moving_average() -> None:
    """The first measurement counts whole, later ones by a fifth; short prompts and broken clocks say nothing."""
    rate = LocalRate()
    rate.measured(100, 1.0)
    rate.measured(1000, 0.0)
    assert rate.tokens_per_s is None
    rate.measured(1000, 1.0)
    assert rate.tokens_per_s == 1000
    rate.measured(1000, 0.5)
    assert rate.tokens_per_s == pytest.approx(1200)
