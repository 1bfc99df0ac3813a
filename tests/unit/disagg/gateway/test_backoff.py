# SPDX-License-Identifier: Apache-2.0
"""Waits between two tries: they double, are bounded, differ, and begin anew."""

from __future__ import annotations

import pytest

from disagg.gateway.backoff import Backoff


@pytest.mark.parametrize(("drawn", "waits"), [(0.0, [0.5, 1, 2, 4, 5, 5]), (0.5, [0.375, 0.75, 1.5, 3, 3.75, 3.75])])
def test_waits_double_up_to_the_limit(drawn: float, waits: list[float]) -> None:
    """Each wait is twice the one before, at most the limit, less the part that was drawn."""
    backoff = Backoff(0.5, 5.0, lambda: drawn)
    assert [backoff.next_s() for _ in waits] == waits


def test_a_wait_keeps_at_least_half() -> None:
    """Whatever is drawn, a wait is between a half and the whole of its length, and two of them differ."""
    waits = [Backoff(1.0, 8.0).next_s() for _ in range(200)]
    assert all(0.5 < wait <= 1.0 for wait in waits)
    assert len(set(waits)) > 100


def test_success_begins_anew() -> None:
    """After a reset the first wait comes again."""
    backoff = Backoff(0.1, 5.0, lambda: 0.0)
    backoff.next_s(), backoff.next_s()
    backoff.reset()
    assert backoff.next_s() == 0.1
