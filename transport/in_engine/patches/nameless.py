# SPDX-License-Identifier: Apache-2.0
"""vLLM's shared-memory queues, without names once all readers have them, so that they end with their processes.

Such a queue is a file of up to 240 MiB in `/dev/shm`, which the process that made it removes at its end. A process that
is killed removes nothing: after a SIGTERM of `serve run` four of these files stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def nameless(wait_until_ready: Callable[[Any], None]) -> Callable[[Any], None]:
    """`MessageQueue.wait_until_ready` that also removes the name of the file. Nobody opens it by name after that."""

    @functools.wraps(wait_until_ready)
    def ready(self: Any) -> None:
        wait_until_ready(self)
        if self._is_writer and self.n_local_reader > 0 and self.buffer.is_creator:
            self.buffer.shared_memory.unlink()
            self.buffer.is_creator = False

    return ready
