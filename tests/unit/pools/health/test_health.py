# SPDX-License-Identifier: Apache-2.0
"""When an engine is asked for a token, suspect, and to be replaced; by a clock that the test moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pools.engine.base import EngineStats
from pools.health.health import HangRules, ListenerRules, progress

EMPTY = EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0)


class Timed:
    """Rules with 2 s, 5 s and 20 s, looked at every quarter of a second as a replica does."""

    def __init__(self) -> None:
        self.now = 100.0
        self.seen = (0, 0)
        self.cpu_s = 0.0
        self.rules = HangRules(probe_interval_s=2, hang_after_s=5, replace_after_s=20, now=self.now)
        self.rules.look(self.now, self.seen)

    def wait(
        self, seconds: float, *, tokens: int = 0, steps: int = 0, carrying: bool = False, cores: float | None = None
    ) -> HangRules:
        """Let time pass, with tokens and steps counted at every look, and so many cores in use."""
        for _ in range(int(seconds * 4)):
            self.now += 0.25
            self.seen = (self.seen[0] + tokens, self.seen[1] + steps)
            self.rules.look(self.now, self.seen, carrying=carrying)
            if cores is not None and self.rules.wants_cpu:
                self.cpu_s += 0.25 * cores
                self.rules.used_cpu(self.cpu_s)
        return self.rules

    def step(self, seconds: float, **options: Any) -> None:
        """One step of an engine with requests, a look shorter than `seconds`; asked for a token after a second."""
        self.wait(1, carrying=True, **options)
        if self.rules.is_due:
            self.rules.asked()
        self.wait(seconds - 1.25, carrying=True, **options)
        self.wait(0.25, tokens=1, carrying=True)


def test_an_idle_engine_is_asked_and_a_busy_one_is_not() -> None:
    """Two seconds without a count make it due, and again two seconds after each answer; counts put it off."""
    timed = Timed()
    assert not timed.wait(1.75).is_due
    assert timed.wait(0.25).is_due
    timed.rules.asked()
    assert not timed.rules.is_due
    timed.rules.answered(0.01)
    assert not timed.wait(1.75).is_due and timed.wait(0.25).is_due
    assert not timed.wait(60, tokens=1).is_due
    assert (timed.rules.probe_s, timed.rules.num_probes) == (0.01, 1)


def test_an_engine_that_requests_wait_for_is_asked_sooner() -> None:
    """A second without a count is enough when the replica carries requests."""
    timed = Timed()
    timed.wait(0.75)
    timed.rules.look(timed.now, timed.seen, carrying=True)
    assert not timed.rules.is_due
    timed.now += 0.25
    timed.rules.look(timed.now, timed.seen, carrying=True)
    assert timed.rules.is_due
    timed.rules.look(timed.now, timed.seen)
    assert not timed.rules.is_due


def test_silence_makes_it_suspect_and_then_replaced() -> None:
    """After 5 s without answer or count it is suspect, after 20 s it has to go; an answer ends both."""
    timed = Timed()
    timed.wait(2).asked()
    assert timed.wait(4.75).reason is None and timed.wait(0.25).reason == "hang"
    assert timed.wait(14.75).verdict is None
    assert "counted nothing for 20.0 s" in (timed.wait(0.25).verdict or "")
    timed.rules.answered(20.0)
    assert (timed.rules.reason, timed.rules.verdict) == (None, None)


def test_steps_put_off_the_suspicion_but_not_for_ever() -> None:
    """A long prompt in chunks brings steps and no token, and its engine is well; more than 15 minutes of it are not."""
    timed = Timed()
    timed.wait(2).asked()
    assert timed.wait(899.75, steps=1).reason is None and timed.rules.verdict is None
    assert "brought no token" in (timed.wait(0.25, steps=1).verdict or "")


def test_long_steps_are_expected_of_an_engine_with_requests() -> None:
    """Twice the longest step before it is suspect, four times before it has to go; without requests the usual, and the
    usual again when no such step was seen for ten minutes."""
    timed = Timed()
    timed.step(8.25)
    timed.step(1)
    timed.rules.answered(8)
    timed.wait(1, carrying=True).asked()
    assert timed.wait(15.75, carrying=True).reason is None
    assert timed.wait(0.25, carrying=True).reason == "hang"
    assert timed.wait(15.75, carrying=True).verdict is None
    assert timed.wait(0.25, carrying=True).verdict is not None
    # Gateways have taken their requests away: its step goes on.
    assert timed.wait(0.25).verdict is not None
    timed = Timed()
    timed.step(8)
    timed.rules.answered(8)
    timed.wait(2).asked()
    assert timed.wait(4.75).reason is None and timed.wait(0.25).reason == "hang"
    timed = Timed()
    timed.step(8)
    timed.rules.answered(8)
    timed.wait(600, tokens=1, carrying=True)
    timed.wait(1, carrying=True).asked()
    assert timed.wait(5, carrying=True).reason == "hang"


def test_requests_that_are_taken_away_do_not_shorten_the_step() -> None:
    """Gateways that give a replica up cut their requests, and the step that they caused goes on."""
    timed = Timed()
    timed.step(8.25)
    timed.step(1)
    timed.rules.answered(8)
    timed.wait(1, carrying=True).asked()
    assert timed.wait(2, carrying=True).reason is None and timed.wait(10).reason is None


def test_an_engine_that_computes_for_its_requests_is_well_for_a_minute() -> None:
    """CPU time puts the suspicion off, for a minute and never for an idle engine; a stopped process uses none, nor
    does one that spins for a second."""
    timed = Timed()
    timed.wait(1, carrying=True).asked()
    assert timed.wait(60, carrying=True, cores=0.9).reason is None and timed.rules.verdict is None
    assert timed.wait(6, carrying=True, cores=0.9).reason == "hang"
    assert timed.wait(16, carrying=True, cores=0.9).verdict is not None
    for cores in (0.0, 0.4):
        timed = Timed()
        timed.wait(1, carrying=True).asked()
        assert timed.wait(4.75, carrying=True, cores=cores).reason is None
        assert timed.wait(0.25, carrying=True, cores=cores).reason == "hang"
    timed = Timed()
    timed.wait(2).asked()
    assert timed.wait(5, cores=0.9).reason == "hang"


def test_a_process_that_was_stopped_made_no_long_step() -> None:
    """It is found as soon when it is stopped again."""
    timed = Timed()
    timed.step(15, cores=0.0)
    timed.rules.answered(15)
    timed.wait(1, carrying=True).asked()
    assert timed.wait(5, carrying=True, cores=0.0).reason == "hang"


def test_an_answer_that_came_behind_requests_says_nothing_of_the_engine() -> None:
    """The time in their queue is not told as its own, whether they were there first or came meanwhile."""
    timed = Timed()
    timed.wait(2).asked()
    timed.rules.answered(0.1)
    timed.wait(1, carrying=True).asked()
    timed.rules.answered(9.0)
    timed.wait(2).asked()
    timed.wait(0.25, carrying=True)
    timed.wait(0.25)
    timed.rules.answered(9.0)
    assert (timed.rules.probe_s, timed.rules.num_probes) == (0.1, 1)
    timed.wait(2).asked()
    timed.rules.answered(0.2)
    assert (timed.rules.probe_s, timed.rules.num_probes) == (0.2, 2)


def test_a_count_ends_the_suspicion() -> None:
    """An engine that counts again is well, though its answer is still out."""
    timed = Timed()
    timed.wait(2).asked()
    assert timed.wait(6).reason == "hang"
    assert timed.wait(0.25, tokens=1).reason is None


def test_time_in_which_this_process_slept_does_not_count() -> None:
    """A replica that was stopped for a minute does not hold that against its engine."""
    timed = Timed()
    timed.wait(2).asked()
    timed.now += 60
    timed.rules.look(timed.now, timed.seen)
    assert timed.rules.reason is None and timed.rules.verdict is None


def test_refused_probes_are_owed() -> None:
    """An engine that refuses one token after the other is suspect for that reason, and asked again."""
    timed = Timed()
    timed.wait(2).asked()
    for _ in range(3):
        timed.rules.failed()
        assert timed.wait(2).is_due
        timed.rules.asked()
    timed.rules.failed()
    assert timed.rules.reason == "probe_failed"


def test_every_kind_of_work_is_progress() -> None:
    """Tokens, prompts, KV on the way and steps each count."""
    fields = ("generation_tokens_total", "prompt_tokens_total", "nixl_bytes_transferred_total")
    for field in (*fields, "mooncake_bytes_transferred_total", "num_steps_total"):
        assert progress(replace(EMPTY, **{field: 1})) > progress(EMPTY)


@pytest.mark.parametrize(
    ("answers", "suspect", "over"),
    [([True], False, False), ([False], False, False), ([False] * 2, True, False), ([False] * 3, True, True)],
)
def test_listener(answers: list[bool], suspect: bool, over: bool) -> None:
    """Two misses in a row make it suspect, the third ends it; one answer makes it well."""
    rules = ListenerRules()
    for answer in answers:
        rules.answered(answer)
    assert (rules.is_suspect, rules.verdict is not None) == (suspect, over)
    rules.answered(True)
    assert not rules.is_suspect and rules.verdict is None
