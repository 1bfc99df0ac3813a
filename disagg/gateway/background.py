# SPDX-License-Identifier: Apache-2.0
"""Tasks that outlive the request that started them, such as giving KV back after a client left."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Background:
    """Detached tasks. Each has its own context, so that a cancelled request does not cancel it. `close` awaits them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loops: set[asyncio.Task[None]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        loop = asyncio.get_running_loop()
        task = contextvars.Context().run(loop.create_task, coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def spawn_kept(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """As `spawn`, but asyncio does not log the task's failure: the code that needs the outcome awaits the task."""
        task = self.spawn(coroutine)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)

    def forever(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """As `spawn`, for a loop of the gateway. `close` cancels it, and its failure is logged with a traceback."""
        task = self.spawn(coroutine)
        self._loops.add(task)
        task.add_done_callback(self._loops.discard)
        task.add_done_callback(_report)
        return task

    async def close(self, timeout_s: float) -> None:
        """Cancel the loops, wait up to `timeout_s` seconds for the other tasks, then cancel those that still run."""
        for loop in self._loops:
            loop.cancel()
        if not self._tasks:
            return
        _, pending = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a background loop of the gateway ended", exc_info=error)
