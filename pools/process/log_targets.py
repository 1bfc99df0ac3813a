# SPDX-License-Identifier: Apache-2.0
"""Keeps Serve's log handlers whole while something in the process configures logging anew.

`logging.config.dictConfig`, which vLLM and uvicorn call, closes every handler of the process. A closed MemoryHandler
has no target: Serve's log of the replica ends there, and a Serve controller that was restarted fails to take the
replica over and stops it (`is_allocated` reads the target's file name; Ray 2.60).
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
from collections.abc import Iterator

SERVE_LOGGER = "ray.serve"


@contextlib.contextmanager
def kept_log_targets(name: str = SERVE_LOGGER) -> Iterator[None]:
    """Give the handlers of a logger their targets back afterwards. A closed file handler opens its file again."""
    handlers = [h for h in logging.getLogger(name).handlers if isinstance(h, logging.handlers.MemoryHandler)]
    targets = [(handler, handler.target) for handler in handlers]
    try:
        yield
    finally:
        for handler, target in targets:
            if handler.target is None and target is not None:
                handler.setTarget(target)
