# SPDX-License-Identifier: Apache-2.0
"""Time limits for what others do, which a loop that stood still does not hold against them."""

from __future__ import annotations

import asyncio
from types import TracebackType

SECOND_LOOK_S = 0.2
"""Extra time after a limit. A loop that was busy finds its timers due before it has read what came in time."""


class Patient:
    """As `asyncio.timeout`, but what came within the limit counts, even if the loop reads it late.

    Leaving the block raises TimeoutError when the limit has ended it. This is a class, because a generator costs more.
    """

    __slots__ = ("_limit_s", "_timeout", "_timer")

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._timer = asyncio.get_running_loop().call_later(self._limit_s, self._look_again)

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(exc_type, exc, traceback)

    def _look_again(self) -> None:
        self._timeout.reschedule(asyncio.get_running_loop().time() + SECOND_LOOK_S)
