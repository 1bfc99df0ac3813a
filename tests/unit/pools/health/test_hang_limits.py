# SPDX-License-Identifier: Apache-2.0
"""When an engine is suspect and when it is replaced, by what the config says and does not say."""

from __future__ import annotations

import pytest

from pools.config import PoolConfig
from pools.health.hang_limits import HangLimits, hang_limits
from transport.tiers import SharedCacheConfig


@pytest.mark.parametrize(
    ("pool", "mq_timeout_s", "limits"),
    [
        (PoolConfig(), None, (5, 20)),
        (PoolConfig(hang_after_s=8), None, (8, 23)),
        (PoolConfig(hang_after_s=8, health_probe_timeout_s=9), None, (8, 9)),
        (PoolConfig(health_probe_timeout_s=60), 10, (21, 60)),
        (PoolConfig(), 10, (21, 36)),
        (PoolConfig(), 1, (5, 20)),
        (PoolConfig(hang_after_s=30), 10, (30, 45)),
    ],
)
def test_limits(pool: PoolConfig, mq_timeout_s: float | None, limits: tuple[float, float]) -> None:
    """A cache server that does not answer twice makes no engine suspect; what is written down counts."""
    shared_cache = None if mq_timeout_s is None else SharedCacheConfig(mq_timeout_s=mq_timeout_s)
    assert hang_limits(pool, shared_cache) == HangLimits(*limits)
