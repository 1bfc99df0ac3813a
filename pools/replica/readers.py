# SPDX-License-Identifier: Apache-2.0
"""Which gateways read an engine's events, how far each has come, and which of them may still send requests.

A replica that leaves must not stop while a gateway has chosen it for a leg that is yet to come, nor before the last of
its events is read. Each read says both. Pure but for the clock; a handful of entries, one a gateway.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_ALIVE_S = 12.0
"""Longer than a gateway that lives lets pass between two reads: one wait of 5 s and its longest retry delay."""


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
        """A read begins. `done`: this gateway sends no more requests here; `after`: it has taken all up to this one."""
        self._readers[reader] = _Reader(self._clock(), after, done)

    def left(self, reader: str) -> None:
        """Its connection broke: it has ended, or comes back at once."""
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
