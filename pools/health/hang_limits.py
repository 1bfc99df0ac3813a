# SPDX-License-Identifier: Apache-2.0
"""How long an engine may count nothing before its replica is suspect, and before it is replaced. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pools.config import HANG_AFTER_S, PoolConfig
from transport.tiers import SharedCacheConfig

_REPLACE_LATER_S = 15.0
_BEYOND_S = 1.0


@dataclass(frozen=True)
class HangLimits:
    """Both in seconds."""

    suspect_s: float
    replace_s: float


def cache_blocks_s(shared_cache: SharedCacheConfig | None) -> float:
    """Seconds for which a cache server that does not answer can block an engine's scheduler.

    The scheduler waits `mq_timeout_s` twice before the engine notices.
    """
    return 0.0 if shared_cache is None else 2 * shared_cache.mq_timeout_s


def hang_limits(pool: PoolConfig, shared_cache: SharedCacheConfig | None) -> HangLimits:
    """The limits that the pool's config sets. A limit that it does not set follows from the shared cache."""
    suspect_s = pool.hang_after_s
    if suspect_s is None:
        suspect_s = (
            HANG_AFTER_S if shared_cache is None else max(HANG_AFTER_S, cache_blocks_s(shared_cache) + _BEYOND_S)
        )
    replace_s = pool.health_probe_timeout_s
    return HangLimits(suspect_s, suspect_s + _REPLACE_LATER_S if replace_s is None else replace_s)
