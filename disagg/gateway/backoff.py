# SPDX-License-Identifier: Apache-2.0
"""How long to wait before something that failed is tried again."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Waits that double up to a limit, each shortened at random by up to a half.

    Otherwise all who lost the same replica at the same moment would also try again at the same moment.
    """

    def __init__(self, first_s: float, max_s: float, draw: Callable[[], float] = random.random) -> None:
        """`draw`: a number from 0 to below 1."""
        self._first_s = first_s
        self._max_s = max_s
        self._draw = draw
        self._delay_s = first_s

    def next_s(self) -> float:
        """Seconds to wait this time."""
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, self._max_s)
        return delay_s * (1 - self._draw() / 2)

    def reset(self) -> None:
        """Call it after a success: the next wait starts from `first_s` again."""
        self._delay_s = self._first_s
