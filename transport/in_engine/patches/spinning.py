# SPDX-License-Identifier: Apache-2.0
"""Readers of vLLM's shared-memory queues that rest between two looks.

For a second after each message they look without a pause. With an engine of two such processes that is a core taken
from the computation at every step, and from the other engines on the machine while this one only answers health
probes. A sleep of an eighth of the time already waited adds at most that share to a step. vLLM's own notifications
are no substitute at the rate of engine steps, where some of them are dropped; a reader that has waited for longer
than a step has none before it that could drop the next, and sleeps until it comes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

_SHORTEST_SLEEP_S = 50e-6
_LONGEST_SLEEP_S = 1e-3
_IDLE_S = 0.05
"""Since the last message. From then on a reader waits for vLLM's notification of the next one."""
_RECENT_S = 1.0
_RECHECK_MS = 50
"""How often it looks itself until `_RECENT_S` all the same, should a notification have been dropped."""


def resting(wait: Callable[..., None]) -> Callable[..., None]:
    """`SpinCondition.wait`: the original is asked only when its own time of spinning is over."""

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
