# SPDX-License-Identifier: Apache-2.0
"""Two attempts at the same thing, the second begun when the first is slow; the first to claim it goes on alone.

Knows nothing of replicas. An attempt claims when it has what both are after, which is before it is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Literal, TypeAlias, TypeVar

T = TypeVar("T")
Outcome: TypeAlias = Literal["won", "lost"]
"""Of the second attempt."""


class Runner:
    """One attempt, as the race knows it."""

    def __init__(self) -> None:
        self.beaten = False
        """Whether the other attempt has claimed. A cancellation is due to that, then."""


Attempt: TypeAlias = Callable[[Runner], Coroutine[Any, Any, T]]


class Race(Generic[T]):
    """The attempts at one thing. Use it once."""

    def __init__(self, drop: Callable[[T], None]) -> None:
        """`drop` ends a result that nobody takes any more."""
        self._drop = drop
        self._tasks: dict[Runner, asyncio.Task[T]] = {}
        self._winner: Runner | None = None

    def claim(self, runner: Runner) -> None:
        """Go on alone: the other attempt is cancelled. Call it in the attempt's own task, before its next wait."""
        self._winner = runner
        for other, task in self._tasks.items():
            if other is not runner:
                other.beaten = True
                task.cancel()

    async def run(
        self, first: Attempt[T], second: Callable[[], Attempt[T] | None], *, after_s: float
    ) -> tuple[T, Outcome | None]:
        """The result of the attempt that claimed, and what became of the second one, if there was one.

        A failure before a claim leaves the other attempt to go on; when both fail, the one that was left last is
        raised. Cancelling it cancels both attempts and waits for their ends.

        Args:
            second: called `after_s` seconds later if nobody has claimed; None when there is nothing else to try.
        """
        taken: T | None = None
        try:
            leading = self._start(first)
            await asyncio.wait({self._tasks[leading]}, timeout=after_s)
            hedge = None
            if not self._tasks[leading].done() and self._winner is None and (attempt := second()) is not None:
                hedge = self._start(attempt)
            decided = await self._decided(leading, hedge)
            taken = self._tasks[decided].result()
            return taken, None if hedge is None else "won" if decided is hedge else "lost"
        finally:
            await self._end(taken)

    def _start(self, attempt: Attempt[T]) -> Runner:
        runner = Runner()
        self._tasks[runner] = asyncio.ensure_future(attempt(runner))
        return runner

    async def _decided(self, leading: Runner, hedge: Runner | None) -> Runner:
        """The attempt whose end is the race's."""
        await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        left = leading if hedge is None or not self._tasks[leading].done() else hedge
        decided = self._winner or left
        await asyncio.wait({self._tasks[decided]})
        return self._winner or decided

    async def _end(self, taken: T | None) -> None:
        running = [task for task in self._tasks.values() if not task.done()]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        for task in self._tasks.values():
            if not task.cancelled() and task.exception() is None and task.result() is not taken:
                self._drop(task.result())
