# SPDX-License-Identifier: Apache-2.0
"""Readers of vLLM's shared-memory queues that sleep between two looks.

vLLM's readers look without a pause for a second after each message. An engine with two such processes so takes a core
from the computation at every step. While it only answers health probes, it takes the core from the other engines on the
machine. Here a reader sleeps for an eighth of the time that it has already waited, which adds at most an eighth to a
step. vLLM's own notifications cannot replace the sleeps at the rate of engine steps, because some are dropped at this
rate. After more than a step without a message, no earlier notification is left that could drop the next one. The reader
then sleeps until the next one comes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

_SHORTEST_SLEEP_S = 50e-6
_LONGEST_SLEEP_S = 1e-3
_IDLE_S = 0.05
"""Seconds since the last message, after which a reader waits for vLLM's notification of the next message."""
_RECENT_S = 1.0
_RECHECK_MS = 50
"""Until `_RECENT_S` a reader still looks at this interval, in case a notification was dropped."""


def resting(wait: Callable[..., None]) -> Callable[..., None]:
    """`SpinCondition.wait` that sleeps where the original spins. It calls the original to wait for a notification."""

    @functools.wraps(wait)
    def resting_wait(self: Any, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = _IDLE_S
        waited = time.monotonic() - self.last_read
        if waited <= _IDLE_S:
            time.sleep(min(max(waited / 8, _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))
        elif waited <= _RECENT_S:
            wait(self, _RECHECK_MS if timeout_ms is None else min(timeout_ms, _RECHECK_MS))
        else:
            wait(self, timeout_ms)

    return resting_wait
