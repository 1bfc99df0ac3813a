# SPDX-License-Identifier: Apache-2.0
"""How long the gateway's event loop stands still. Every stream of the gateway stands still with it."""

from __future__ import annotations

import asyncio

from disagg.observability.metrics import Metrics

_TICK_S = 0.05


async def watch_pauses(metrics: Metrics) -> None:
    """Observe, for ever, by how much the loop is late."""
    loop = asyncio.get_running_loop()
    longest = 0.0
    while True:
        due = loop.time() + _TICK_S
        await asyncio.sleep(_TICK_S)
        late = max(0.0, loop.time() - due)
        metrics.loop_pause_seconds.observe(late)
        if late > longest:
            longest = late
            metrics.loop_longest_pause_seconds.set(late)
