# SPDX-License-Identifier: Apache-2.0
"""The thread in which a replica renews its use of its node's LMCache server, without Ray.

Not a task of the replica's event loop: vLLM blocks that loop while an engine starts, which takes minutes, and the
server ends itself about a minute after the last renewal.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Literal

from pools.cache_server.policy import RENEW_PERIOD_S, retry_delay_s

logger = logging.getLogger(__name__)

State = Literal["healthy", "starting", "lost"]
"""What a renewal finds: a server that answers, one that does not yet, or nobody who looks after one."""


class Renewal:
    """Renews again and again until it is stopped or the process ends. No exception ends it."""

    def __init__(
        self, renew: Callable[[], State], find_again: Callable[[], None], *, period_s: float = RENEW_PERIOD_S
    ) -> None:
        """Starts nothing yet.

        Args:
            renew: one renewal. Blocks, for seconds at most; may raise.
            find_again: finds or makes a server that was lost. Blocks and may raise like `renew`.
            period_s: seconds between two renewals.
        """
        self._renew = renew
        self._find_again = find_again
        self._period_s = period_s
        self._num_tries = 0
        self._told = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cache-server-renewal", daemon=True)

    def start(self) -> None:
        """Start the thread; call it once. The first renewal comes after one period."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread and wait for it, at most `timeout_s`. Blocks."""
        self._stopped.set()
        self._thread.join(timeout_s)

    def once(self) -> float:
        """Renew, and find the server again if it was lost. Blocks, never raises.

        Returns:
            Seconds until the next renewal.
        """
        try:
            state = self._renew()
        except Exception as exc:
            self._tell("does not answer", exc)
            return self._period_s
        if state == "healthy":
            if self._told:
                logger.info("the cache server of this node answers again")
            self._told, self._num_tries = False, 0
        if state != "lost":
            return self._period_s
        self._num_tries += 1
        self._tell("was lost and is made again")
        try:
            self._find_again()
        except Exception as exc:
            self._tell("cannot be made again yet", exc)
        return retry_delay_s(self._num_tries, self._period_s)

    def _run(self) -> None:
        wait_s = self._period_s
        while not self._stopped.wait(wait_s):
            wait_s = self.once()

    def _tell(self, what: str, exc: Exception | None = None) -> None:
        """Log one warning for each outage. An outage lasts until the server answers."""
        level = logging.DEBUG if self._told else logging.WARNING
        logger.log(level, "the cache server of this node %s%s", what, f": {exc!r}" if exc is not None else "")
        self._told = True
