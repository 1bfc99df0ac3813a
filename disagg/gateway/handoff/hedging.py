# SPDX-License-Identifier: Apache-2.0
"""A race of two attempts at one result. The second begins when the first is slow; the one that claims goes on alone.

An attempt claims when it has the result that both want, which is before its task ends. Nothing here knows of replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Literal, TypeAlias, TypeVar

T = TypeVar("T")
Outcome: TypeAlias = Literal["won", "lost"]
"""What became of the second attempt."""


class Runner:
    """One attempt, as the race knows it."""

    def __init__(self) -> None:
        self.beaten = False
        """Whether the other attempt has claimed. If so, that is why this attempt is cancelled."""


Attempt: TypeAlias = Callable[[Runner], Coroutine[Any, Any, T]]


class Race(Generic[T]):
    """The attempts at one thing. Use it once."""

    def __init__(self, drop: Callable[[T], None]) -> None:
        """`drop` ends a result that `run` does not return."""
        self._drop = drop
        self._tasks: dict[Runner, asyncio.Task[T]] = {}
        self._winner: Runner | None = None

    def claim(self, runner: Runner) -> None:
        """Let `runner` go on alone, and cancel the other attempt. Call it in `runner`'s task, before its next wait."""
        self._winner = runner
        for other, task in self._tasks.items():
            if other is not runner:
                other.beaten = True
                task.cancel()

    async def run(
        self, first: Attempt[T], second: Callable[[], Attempt[T] | None], *, after_s: float
    ) -> tuple[T, Outcome | None]:
        """The result of the attempt that claimed, and what became of the second one, if there was one.

        When one attempt fails before a claim, the other one goes on. When both fail, `run` raises the error of the one
        that failed last. When `run` is cancelled, it cancels both attempts and waits until they have ended.

        Args:
            second: called after `after_s` seconds if the first attempt has neither claimed nor ended. Returns the
                second attempt, or None when there is nothing else to try.
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
        """Wait for the end of the race. Returns the attempt whose result or error `run` passes on."""
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
