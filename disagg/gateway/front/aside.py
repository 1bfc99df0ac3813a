# SPDX-License-Identifier: Apache-2.0
"""A second event loop, in a thread of its own, for coroutines whose synchronous parts would hold up the streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Aside:
    """The thread and its loop. It starts with the first call, and ends with the process."""

    def __init__(self, name: str, *, max_at_once: int) -> None:
        """`max_at_once`: coroutines that may run there; further calls wait."""
        self._name = name
        self._room = asyncio.Semaphore(max_at_once)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the coroutine returns or raises. Cancelling `run` cancels it.

        Args:
            make: makes the coroutine; called in the other thread.
        """
        async with self._room:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_made(make), self._started()))

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True).start()
        return self._loop


async def _made(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return await make()
