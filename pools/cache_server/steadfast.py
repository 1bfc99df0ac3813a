# SPDX-License-Identifier: Apache-2.0
"""The loop of LMCache's message queue, begun again after a message that it cannot take apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import zmq
from lmcache.logging import init_logger

logger = init_logger(__name__)

Loop = Callable[[Any], None]


def steadfast(loop: Loop) -> Loop:
    """Wrap `loop`, so that it begins again after each exception.

    The message that caused the exception has been taken off the queue by then. A `zmq.ZMQError` is raised: it is about
    the socket and not about a message, and would come again at once.
    """

    @functools.wraps(loop)
    def run(server: Any) -> None:
        num_refused = 0
        while True:
            try:
                return loop(server)
            except zmq.ZMQError:
                raise
            except Exception as exc:
                num_refused += 1
                if num_refused == 1:
                    logger.warning("a malformed message at the queue was refused (%r); others are not logged", exc)

    return run
