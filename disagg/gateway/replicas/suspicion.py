# SPDX-License-Identifier: Apache-2.0
"""Which replicas are slow although they live, and whether a pool's replicas die one after the other. Pure.

Everything is by incarnation: what was known of a replica is not held against its successor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from cachetools import FIFOCache

_SLOW_S = 1.0
"""A probe that takes no longer than this is never slow."""
_SLOW_FACTOR = 5.0
"""A slow probe takes more than so many times the best one of its pool."""
_SLOW_PROBES = 3
"""Slow probes in a row that make a replica slow."""
_LOSSES = 3
_LOSSES_WITHIN_S = 120.0
_MAX_REMEMBERED = 256


@dataclass(frozen=True)
class ProbeTime:
    """How long an engine took for the last probe: one token that its replica asked it for."""

    seconds: float
    number: int
    """Which probe it was. Two answers with one number tell the same measurement."""


class Slowness:
    """Compares the probes of one pool."""

    def __init__(self) -> None:
        # Incarnation to (number of the probe that was judged last, slow ones in a row).
        self._judged: dict[str, tuple[int, int]] = {}

    def judge(self, probes: Mapping[str, ProbeTime]) -> set[str]:
        """The slow ones of the incarnations in `probes`. All other incarnations are forgotten."""
        limit_s = max(_SLOW_S, _SLOW_FACTOR * min((probe.seconds for probe in probes.values()), default=0.0))
        judged: dict[str, tuple[int, int]] = {}
        for incarnation, probe in probes.items():
            number, num_slow = self._judged.get(incarnation, (0, 0))
            if probe.number != number:
                num_slow = num_slow + 1 if probe.seconds > limit_s else 0
            judged[incarnation] = (probe.number, num_slow)
        self._judged = judged
        return {incarnation for incarnation, (_, num_slow) in judged.items() if num_slow >= _SLOW_PROBES}


class CrashLoop:
    """Counts the replicas that one pool lost. A replica that was scaled down is not lost."""

    def __init__(self) -> None:
        self._lost_at: deque[float] = deque(maxlen=_LOSSES)
        self._counted: FIFOCache[str, None] = FIFOCache(_MAX_REMEMBERED)

    def count_loss(self, incarnation: str, now: float) -> bool:
        """Count a lost replica, once. Returns whether the crash loop begins with this loss."""
        if incarnation in self._counted:
            return False
        was_on = self.is_on(now)
        self._counted[incarnation] = None
        self._lost_at.append(now)
        return self.is_on(now) and not was_on

    def is_on(self, now: float) -> bool:
        """Whether the pool is in a crash loop, so that its new replicas go on probation."""
        return len(self._lost_at) == _LOSSES and now - self._lost_at[0] <= _LOSSES_WITHIN_S
