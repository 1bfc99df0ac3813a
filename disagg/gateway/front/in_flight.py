# SPDX-License-Identifier: Apache-2.0
"""How many requests this gateway replica carries at the moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InFlight:
    """A count. Belongs to the gateway's loop."""

    def __init__(self) -> None:
        self.num = 0

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Count one request until the block ends."""
        self.num += 1
        try:
            yield
        finally:
            self.num -= 1
