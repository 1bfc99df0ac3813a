# SPDX-License-Identifier: Apache-2.0
"""Room for one application at a time, shared by all tests of a session that want the same one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any


class Slot:
    """Holds what one context manager yields, under a key, until another key is asked for."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._held: Any = None
        self._context = ExitStack()

    def take(self, key: str, make: Callable[[], AbstractContextManager[Any]]) -> Any:
        """What is held under `key`. When it is another one, that one is left while `make()` is entered.

        Returns when both are done. Raises what either raised.
        """
        if self._key != key:
            former = self._context
            self._key, self._held, self._context = None, None, ExitStack()
            with ThreadPoolExecutor(1) as leaving:
                left = leaving.submit(former.close)
                self._held = self._context.enter_context(make())
                self._key = key
            left.result()
        return self._held

    def empty(self) -> None:
        """Leave what is held."""
        self._key = self._held = None
        self._context.close()
