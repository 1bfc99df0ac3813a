# SPDX-License-Identifier: Apache-2.0
"""Races of two attempts: who wins, who is cancelled, and what is raised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from disagg.gateway.handoff.hedging import Attempt, Race, Runner


class Course:
    """Attempts that wait to be told to claim, to end or to fail."""

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self.race: Race[str] = Race(self.dropped.append)
        self.said: dict[str, asyncio.Future[str]] = {}
        self.ended: dict[str, bool] = {}
        """Whether it was beaten, of attempts that were cancelled."""
        self.begun: dict[str, asyncio.Event] = {name: asyncio.Event() for name in ("first", "second")}

    def attempt(self, name: str) -> Attempt[str]:
        async def run(runner: Runner) -> str:
            self.begun[name].set()
            self.said[name] = asyncio.get_running_loop().create_future()
            try:
                if await self.said[name] == "claim":
                    self.race.claim(runner)
                    self.said[name] = asyncio.get_running_loop().create_future()
                    await self.said[name]
            except asyncio.CancelledError:
                self.ended[name] = runner.beaten
                raise
            return name

        return run

    def run(self, after_s: float = 0.0, second: bool = True) -> asyncio.Task[tuple[str, str | None]]:
        other: Callable[[], Attempt[str] | None] = lambda: self.attempt("second") if second else None  # noqa: E731
        return asyncio.ensure_future(self.race.run(self.attempt("first"), other, after_s=after_s))

    async def claims(self, name: str) -> None:
        await self.begun[name].wait()
        self.said[name].set_result("claim")
        while self.said[name].done():
            await asyncio.sleep(0)

    async def ends(self, name: str) -> None:
        await self.begun[name].wait()
        self.said[name].set_result("end")

    async def fails(self, name: str) -> None:
        await self.begun[name].wait()
        self.said[name].set_exception(ValueError(name))


async def test_the_second_wins() -> None:
    """The first is cancelled as soon as the second claims, long before that one is over."""
    course = Course()
    running = course.run()
    await course.claims("second")
    await asyncio.wait([course.race._tasks[r] for r in course.race._tasks if r.beaten])
    assert course.ended == {"first": True} and not running.done()
    await course.ends("second")
    assert await running == ("second", "won")
    assert not course.dropped


async def test_the_first_wins() -> None:
    """A second attempt that was begun for nothing is cancelled."""
    course = Course()
    running = course.run()
    await course.begun["second"].wait()
    await course.claims("first")
    await course.ends("first")
    assert await running == ("first", "lost")
    assert course.ended == {"second": True}


async def test_no_second_attempt_after_a_claim() -> None:
    """What has been claimed in time is not hedged, however long it goes on; nor what fails in time."""
    course = Course()
    running = course.run(after_s=0.05)
    await course.claims("first")
    await asyncio.sleep(0.1)
    await course.ends("first")
    assert await running == ("first", None)
    failing = Course()
    running = failing.run(after_s=60)
    await failing.fails("first")
    with pytest.raises(ValueError, match="first"):
        await running
    assert not course.begun["second"].is_set() and not failing.begun["second"].is_set()


async def test_nothing_else_to_try() -> None:
    """Without a second attempt the first decides alone."""
    course = Course()
    running = course.run(second=False)
    await course.ends("first")
    assert await running == ("first", None)


@pytest.mark.parametrize(("failing", "other", "outcome"), [("first", "second", "won"), ("second", "first", "lost")])
async def test_a_failure_leaves_the_other(failing: str, other: str, outcome: str) -> None:
    """An attempt that fails before anybody has claimed ends nothing."""
    course = Course()
    running = course.run()
    await course.begun["second"].wait()
    await course.fails(failing)
    await asyncio.wait(list(course.race._tasks.values()), return_when=asyncio.FIRST_COMPLETED)
    await course.claims(other)
    await course.ends(other)
    assert await running == (other, outcome)


async def test_both_fail() -> None:
    """The failure of the attempt that was left last is raised."""
    course = Course()
    running = course.run()
    await course.begun["second"].wait()
    await course.fails("second")
    await course.fails("first")
    with pytest.raises(ValueError):
        await running


async def test_cancelling_ends_both() -> None:
    """Who waits for the race and leaves takes both attempts along, and neither is told that it was beaten."""
    course = Course()
    running = course.run()
    await course.begun["second"].wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert course.ended == {"first": False, "second": False}


async def test_a_result_that_nobody_takes_is_dropped() -> None:
    """An attempt that ends in the moment its race is cancelled has its result ended."""
    course = Course()
    running = course.run()
    await course.begun["second"].wait()
    task = next(iter(course.race._tasks.values()))
    task.add_done_callback(lambda _: running.cancel())
    await course.ends("first")
    with pytest.raises(asyncio.CancelledError):
        await running
    assert course.dropped == ["first"]
