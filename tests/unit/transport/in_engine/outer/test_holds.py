# SPDX-License-Identifier: Apache-2.0
"""The rules of holds: what a hand-off is called, how ranks agree on its end, what is settled when."""

from __future__ import annotations

import pytest

from transport.in_engine.outer.holds import Hold, Holds, merge_ended


def test_a_consumed_hold_ends_once() -> None:
    """Produced, reported by its one rank, closed; a second close finds nothing."""
    holds = Holds()
    holds.produced("r-1", "h-1")
    holds.note({"r-1": ("consumed", 21.5)})
    assert holds.close("r-1") == Hold("h-1", "consumed", 21.5)
    assert holds.close("r-1") is None
    assert len(holds) == 0


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([("consumed", 20.0), ("consumed", 12.0)], ("consumed", 12.0)),
        ([("consumed", 20.0), ("released", 25.0)], ("released", 20.0)),
        ([("released", 9.0), ("consumed", None)], ("released", 9.0)),
        ([("released", 9.0), ("expired", None)], ("expired", 9.0)),
        ([("expired", None), ("consumed", 3.0)], ("expired", 3.0)),
        ([("consumed", None), ("consumed", None)], ("consumed", None)),
    ],
)
@pytest.mark.parametrize("in_one_step", [True, False])
def test_ranks_agree(ranks: list, expected: tuple, in_one_step: bool) -> None:  # type: ignore[type-arg]
    """The worse outcome and the shorter lease count, whether the ranks report in one step or in two."""
    holds = Holds()
    holds.produced("r-1", "h-1")
    first, second = ({"r-1": rank} for rank in ranks)
    if in_one_step:
        holds.note(merge_ended(first, second))
    else:
        holds.note(first)
        holds.note(second)
    hold = holds.close("r-1")
    assert hold is not None
    assert (hold.outcome, hold.lease_left_s) == expected


def test_merging_keeps_what_only_one_rank_knows() -> None:
    """Requests that only one of two ranks reports stay as they are, and neither argument is changed."""
    first = {"a": ("consumed", 1.0)}
    second = {"b": ("expired", None)}
    assert merge_ended(first, second) == {"a": ("consumed", 1.0), "b": ("expired", None)}  # type: ignore[arg-type]
    assert (first, second) == ({"a": ("consumed", 1.0)}, {"b": ("expired", None)})


def test_settle_names_the_request_once() -> None:
    """A settled hand-off is shipped under vLLM's id, one time, however often it is settled."""
    holds = Holds()
    holds.produced("r-1", "h-1")
    assert holds.settle(["h-1", "h-1"]) == []
    assert holds.take_to_settle() == {"r-1"}
    holds.settle(["h-1"])
    assert holds.take_to_settle() == set()


def test_settle_before_produced_is_applied_when_it_is() -> None:
    """An id that is not held is handed back, remembered, and settled as soon as its KV is there."""
    holds = Holds()
    assert holds.settle(["h-1"]) == ["h-1"]
    assert holds.take_to_settle() == set()
    holds.produced("r-1", "h-1")
    holds.produced("r-2", "h-2")
    assert holds.take_to_settle() == {"r-1"}


def test_early_settles_are_bounded() -> None:
    """Of more early settles than are kept the newest count."""
    holds = Holds(early_settles=2)
    holds.settle(["h-1", "h-2", "h-3"])
    for number in (1, 2, 3):
        holds.produced(f"r-{number}", f"h-{number}")
    assert holds.take_to_settle() == {"r-2", "r-3"}


def test_a_hold_that_ended_is_not_settled() -> None:
    """What closed before the next metadata went out is not named to the ranks any more."""
    holds = Holds()
    holds.produced("r-1", "h-1")
    holds.settle(["h-1"])
    holds.note({"r-1": ("consumed", 5.0)})
    assert holds.close("r-1") == Hold("h-1", "consumed", 5.0)
    assert holds.take_to_settle() == set()


@pytest.mark.parametrize(("settled", "outcome"), [(False, "consumed"), (True, "released")])
def test_a_transfer_child_that_does_not_say(settled: bool, outcome: str) -> None:
    """Without a report the hold counts as released when it was settled, else as consumed."""
    holds = Holds()
    holds.produced("r-1", "h-1")
    if settled:
        holds.settle(["h-1"])
    assert holds.close("r-1") == Hold("h-1", outcome, None)  # type: ignore[arg-type]


def test_reports_about_others_are_ignored() -> None:
    """Requests that never were hand-offs leave nothing behind."""
    holds = Holds()
    holds.note({"r-9": ("expired", None)})
    assert holds.close("r-9") is None
