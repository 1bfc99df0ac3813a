# SPDX-License-Identifier: Apache-2.0
"""Which gateways read an engine's events, how far each has come, and which of them may still send requests.

A replica that leaves the pool must not stop while a gateway may still send it a leg, nor before the gateways have read
its last event. With each read a gateway tells the replica both. Pure but for the clock; one entry for each gateway.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_ALIVE_S = 12.0
"""A gateway counts as gone when its last read is older. A live gateway reads more often: between two reads it lets pass
one wait of 5 s and its longest retry delay."""


@dataclass
class _Reader:
    seen_at: float
    after: int
    done: bool


class Readers:
    """The gateways that read events of one engine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._readers: dict[str, _Reader] = {}

    def read(self, reader: str, after: int, *, done: bool) -> None:
        """Note that a gateway begins a read.

        Args:
            after: number of the last event that the gateway has taken.
            done: whether the gateway sends no more requests to this replica.
        """
        self._readers[reader] = _Reader(self._clock(), after, done)

    def left(self, reader: str) -> None:
        """Forget a gateway whose connection broke: it has ended, or it reads again at once."""
        self._readers.pop(reader, None)

    def may_send(self) -> int:
        """Number of gateways that live and have not said that they are done."""
        return sum(1 for reader in self._alive() if not reader.done)

    def behind(self, newest: int) -> int:
        """Number of gateways that live and have not taken event `newest`."""
        return sum(1 for reader in self._alive() if reader.after < newest)

    def _alive(self) -> list[_Reader]:
        limit = self._clock() - _ALIVE_S
        self._readers = {name: reader for name, reader in self._readers.items() if reader.seen_at >= limit}
        return list(self._readers.values())
