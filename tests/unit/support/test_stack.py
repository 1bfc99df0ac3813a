# SPDX-License-Identifier: Apache-2.0
"""How tests share what takes long to start: a slot for one application, and contexts entered side by side."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from tests.support.slot import Slot
from tests.support.stack import side_by_side


@contextlib.contextmanager
def noting(name: str, notes: list[str]) -> Iterator[str]:
    notes.append(f"start {name}")
    try:
        yield name
    finally:
        notes.append(f"stop {name}")


def test_a_slot_starts_one_application_for_all_who_ask() -> None:
    """The same key finds it running, another key ends it, and an emptied slot starts it again."""
    notes: list[str] = []
    slot = Slot()
    for name in ("a", "a", "b"):
        assert slot.take(name, lambda name=name: noting(name, notes)) == name
    assert notes[0] == "start a" and sorted(notes[1:]) == ["start b", "stop a"]
    slot.empty()
    slot.take("b", lambda: noting("b", notes))
    assert notes[3:] == ["stop b", "start b"]


def test_a_slot_ends_one_application_while_another_one_starts() -> None:
    """Each takes long and needs little of the machine; whoever asked has the new one once the former one is gone."""
    barrier = threading.Barrier(2, timeout=10)

    @contextlib.contextmanager
    def former() -> Iterator[str]:
        yield "former"
        barrier.wait()

    @contextlib.contextmanager
    def latter() -> Iterator[str]:
        barrier.wait()
        yield "latter"

    slot = Slot()
    slot.take("a", former)
    assert slot.take("b", latter) == "latter"


def test_a_slot_whose_start_failed_is_empty() -> None:
    """The next test tries again instead of getting what is not there."""
    notes: list[str] = []
    slot = Slot()
    with pytest.raises(OSError, match="no room"):
        slot.take("a", _failing)
    assert slot.take("a", lambda: noting("a", notes)) == "a"


def test_contexts_are_entered_at_the_same_time() -> None:
    """Each waits for the other one, and both are left."""
    notes: list[str] = []
    barrier = threading.Barrier(2, timeout=10)

    @contextlib.contextmanager
    def meeting(name: str) -> Iterator[str]:
        barrier.wait()
        with noting(name, notes):
            yield name

    with side_by_side(meeting("a"), meeting("b")) as names:
        assert names == ["a", "b"]
    assert sorted(notes) == ["start a", "start b", "stop a", "stop b"]


def test_a_context_beside_one_that_fails_is_left() -> None:
    """And the failure is the one that is raised."""
    notes: list[str] = []
    with pytest.raises(OSError, match="no room"), side_by_side(noting("a", notes), _failing()):
        raise AssertionError("nothing was entered")
    assert notes == ["start a", "stop a"]


@contextlib.contextmanager
def _failing() -> Iterator[str]:
    raise OSError("no room")
    yield ""
