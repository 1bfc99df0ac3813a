# SPDX-License-Identifier: Apache-2.0
"""Room for one application at a time, shared by all tests of a session that want the same one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any


class Slot:
    """Holds what one context manager yields, under a key, until another key is asked for."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._held: Any = None
        self._context = ExitStack()

    def take(self, key: str, make: Callable[[], AbstractContextManager[Any]]) -> Any:
        """What is held under `key`; when it is another one, that one is left first and `make()` entered."""
        if self._key != key:
            self.empty()
            self._held = self._context.enter_context(make())
            self._key = key
        return self._held

    def empty(self) -> None:
        """Leave what is held."""
        self._key = self._held = None
        self._context.close()
