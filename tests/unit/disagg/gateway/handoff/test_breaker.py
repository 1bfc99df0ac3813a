# SPDX-License-Identifier: Apache-2.0
"""When a pair's breaker opens, by what was said of its hand-offs and in which order."""

from __future__ import annotations

import pytest

from disagg.gateway.handoff import breaker
from disagg.gateway.handoff.breaker import Opened, PairBreaker
from disagg.gateway.replicas.membership import Pair
from tests.support.replica_clients import lonely_member
from tests.unit.disagg.gateway.replicas.test_membership import info

PAIR = Pair(lonely_member(info("p0", "p0-1")), lonely_member(info("d0", "d0-1")))
OTHER = Pair(PAIR.prefill, lonely_member(info("d1", "d1-1")))


def told(breaker: PairBreaker, words: str, pair: Pair = PAIR) -> list[Opened]:
    """What opened: each letter is a hand-off of its own, `f`ailed, `s`ucceeded, `u`nread after success, `o`ver."""
    opened: list[Opened | None] = []
    for word in words:
        handoff_id = f"h{len(breaker._pairs)}-{id(opened)}-{len(opened)}"
        breaker.begin(handoff_id, pair)
        if word in "su":
            breaker.succeeded(handoff_id)
        if word == "o":
            breaker.over(handoff_id)
        opened.append(breaker.failed(handoff_id) if word in "fuo" else None)
    return [found for found in opened if found is not None]


@pytest.mark.parametrize(
    ("words", "num_opened"),
    [
        ("ff", 0),
        ("fff", 1),
        ("ffsff", 0),
        ("ffsfff", 1),
        ("uuu", 1),
        ("uusu", 0),
        ("ufu", 1),
        ("ooooo", 0),
        ("foofof", 1),
    ],
)
def test_three_in_a_row_open_it(words: str, num_opened: int) -> None:
    """Failures in a row count, a success between them resets, one that is taken back does not."""
    assert len(told(PairBreaker(), words)) == num_opened


def test_late_words_count() -> None:
    """Three answers whose engines say `unread` only after all of them are three failures in a row."""
    pairs = PairBreaker()
    for name in ("a", "b", "c"):
        pairs.begin(name, PAIR)
        pairs.succeeded(name)
    assert [pairs.failed(name) is not None for name in ("a", "b", "c")] == [False, False, True]


def test_a_success_is_taken_back_with_what_it_reset() -> None:
    """Two failures, a success that turns out to be none: the breaker opens as if there had been no success."""
    pairs = PairBreaker()
    told(pairs, "ff")
    pairs.begin("a", PAIR)
    pairs.succeeded("a")
    assert pairs.failed("a") is not None


def test_a_handoff_fails_once() -> None:
    """What is said twice of one hand-off counts once, and unknown ids count nothing."""
    pairs = PairBreaker()
    pairs.begin("a", PAIR)
    assert [pairs.failed("a") for _ in range(5)] == [None] * 5
    assert not told(pairs, "f")
    assert pairs.failed("never seen") is None


def test_pairs_count_apart() -> None:
    """Failures of other pairs of the same replicas say nothing of this one."""
    pairs = PairBreaker()
    assert not told(pairs, "ff") + told(pairs, "ff", OTHER)
    (opened,) = told(pairs, "f")
    assert opened.pair is PAIR and opened.first


def test_rest_doubles_until_a_success() -> None:
    """A pair that keeps failing is left alone ever longer, up to a bound, and is told of once."""
    pairs = PairBreaker()
    opened = told(pairs, "fff" * 8)
    assert [found.rest_s for found in opened] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [found.first for found in opened] == [True] + [False] * 7
    (again,) = told(pairs, "sfff")
    assert (again.rest_s, again.first) == (0.5, False)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old hand-offs and the states of replicas that are gone are forgotten."""
    monkeypatch.setattr(breaker, "_MAX_REMEMBERED", 3)
    pairs = PairBreaker()
    for i in range(10):
        told(pairs, "f", Pair(lonely_member(info("p0", str(i))), PAIR.decode))
        pairs.begin(f"h{i}", PAIR)
    assert (len(pairs._pairs), len(pairs._states)) == (3, 10)
    pairs.retain({("9", "d0-1")})
    assert pairs._states.keys() == {("9", "d0-1")}
