# SPDX-License-Identifier: Apache-2.0
"""What happened to the KV of hand-offs in one engine, in order; the truth from which gateways keep their ledgers.

Every event is a JSON-able dict with `kind` and `at` (unix seconds). `id` is the hand-off id that the gateway chose.

- `produced` (prefill): `id`, `tokens`, `bytes`. The engine holds this KV from now on.
- `ended` (prefill): `id`, `outcome` (consumed, released, expired), `lease_left_s` or null, `adopted`. The hold is over.
  With `adopted` the shared tier keeps the KV, and a `rescued` or `rescue_failed` follows.
- `rescued` (prefill): `id`, `tokens`, `bytes`, `chunks` (digests, see `transport.digests`). Stored in the shared tier.
- `rescue_failed` (prefill): `id`, `reason`.
- `loaded` (both): `source` (lmcache, offload), `tokens`, and for lmcache `chunks`. A request loads from a tier.
- `tier_degraded`, `tier_recovered` (both): `tier`. The engine goes on without a tier that does not answer, or with it
  again.
- `unread` (decode): `id`. The request ended before this engine read the KV, so the gateway has to settle the hand-off.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]

MAX_EVENTS = 16_384
"""Events kept for readers that are behind; older ones are lost to them."""


@dataclass(frozen=True)
class Batch:
    """One answer to a reader."""

    next: int
    """The `after` of the reader's next read."""
    lost: int
    """Number of events after `after` that the log dropped before the reader asked."""
    events: list[Event]


class EventLog:
    """The newest events of one engine, numbered from 1. Used from one event loop; `append` never blocks."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._events: deque[Event] = deque(maxlen=max_events)
        self._newest = 0
        self._waiting: asyncio.Event | None = None

    @property
    def newest(self) -> int:
        """Number of the last event; 0 before the first."""
        return self._newest

    def append(self, event: Event) -> None:
        self._events.append(event)
        self._newest += 1
        if self._waiting is not None:
            self._waiting.set()
            self._waiting = None

    async def read(self, after: int, wait_s: float) -> Batch:
        """All events numbered above `after`, waiting up to `wait_s` seconds for the first.

        An `after` that this log has not reached is of an earlier incarnation, so reading starts at the beginning.
        """
        if after > self._newest:
            after = 0
        if after == self._newest and wait_s > 0:
            if self._waiting is None:
                self._waiting = asyncio.Event()
            try:
                await asyncio.wait_for(self._waiting.wait(), wait_s)
            except TimeoutError:
                pass
        oldest = self._newest - len(self._events) + 1
        lost = max(0, oldest - after - 1)
        skipped = after + lost - (oldest - 1)
        return Batch(next=self._newest, lost=lost, events=list(self._events)[skipped:])
