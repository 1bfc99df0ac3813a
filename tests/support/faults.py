# SPDX-License-Identifier: Apache-2.0
"""A steady load that knows the answers, and what it found: for every proof that breaks something meanwhile.

    chosen = reference()
    with running(CONFIG, name="...", change=change(1, 2)) as stack, Load(stack.url, chosen.known) as load:
        mark = kill9(process_of(replicas(stack, "decode")[0]))
        ...
    load.failed, load.wrong, load.worst_gap(), load.good_after(mark)

Leaving the block lets the answers that are running finish.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import httpx

from tests.support.fault_cases import Known, Reference, change, difference, reference
from tests.support.fault_processes import (
    engine_core,
    family,
    gone,
    kill9,
    process_of,
    replicas,
    stopped,
    wait_replaced,
    wait_warm,
)
from tests.support.heard import Heard, listen
from tests.support.stack import wait_until

__all__ = [
    "Heard",
    "Known",
    "Load",
    "Reference",
    "change",
    "difference",
    "engine_core",
    "family",
    "gone",
    "kill9",
    "listen",
    "process_of",
    "reference",
    "replicas",
    "stopped",
    "wait_replaced",
    "wait_until",
    "wait_warm",
]


class Load:
    """Clients that stream known requests one after another, in a thread of its own. Numbers may be read meanwhile.

    A request that is repeated has another `cache_salt` each time, so that its prompt is computed or moved again.
    """

    def __init__(
        self,
        url: str,
        known: Sequence[Known],
        *,
        clients: int = 6,
        pause_s: float = 0.0,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 180.0,
    ) -> None:
        """`pause_s`: of each client between two requests; `timeout_s`: without a byte, then the request has failed."""
        assert known, "a load needs requests"
        self._url, self._known, self._num_clients, self._pause_s = url, known, clients, pause_s
        self._headers, self._timeout_s = dict(headers or {}), timeout_s
        self._turn = itertools.count()
        self._stop = threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="load", daemon=True)
        self._open: dict[int, Heard] = {}
        self.heard: list[Heard] = []
        """Every answer that has ended, in the order of their ends."""

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let the answers that are running finish. Raises what broke the load itself."""
        self._stop.set()
        self._thread.join()
        if self._problem is not None:
            raise self._problem

    @property
    def failed(self) -> list[str]:
        """Why requests had no whole answer, an entry for each."""
        return [f"{h.name} on {h.decode or '?'}: {h.failed}" for h in list(self.heard) if h.failed is not None]

    @property
    def wrong(self) -> list[str]:
        """What is wrong with whole answers, an entry for each."""
        return [f"{h.name} on {h.decode or '?'}: {h.wrong}" for h in list(self.heard) if h.wrong is not None]

    def streaming(self, replica_id: str | None = None) -> int:
        """Answers under way that have begun to come, on one decode replica or all."""
        return sum(1 for h in list(self._open.values()) if h.first and replica_id in (None, h.decode))

    def worst_gap(self, since: float = 0.0) -> float:
        """Longest time between two pieces of text of one answer, of gaps that ended after `since`."""
        return max((h.gap_s for h in list(self.heard) if h.gap_at >= since), default=0.0)

    def worst_first(self, since: float = 0.0) -> float:
        """Longest time to the first text, of requests sent after `since`."""
        return max((h.first - h.started for h in list(self.heard) if h.first and h.started >= since), default=0.0)

    def good_after(self, mark: float) -> float | None:
        """Seconds from `mark` to the end of the first good answer to a request that was sent after it."""
        return min((h.ended - mark for h in list(self.heard) if h.good and h.ended and h.started >= mark), default=None)

    def first_text_after(self, mark: float) -> float | None:
        """Seconds from `mark` to the first text of a good answer to a request that was sent after it."""
        found = (h.first - mark for h in list(self.heard) if h.good and h.first and h.started >= mark)
        return min(found, default=None)

    def since(self, mark: float) -> list[Heard]:
        """Answers that ended after `mark`."""
        return [h for h in list(self.heard) if h.ended and h.ended >= mark]

    def by_replica(self, since: float = 0.0) -> Counter[tuple[str, str]]:
        """Number of answers by what `x-disagg-prefill` and `x-disagg-decode` said, of requests sent after `since`."""
        return Counter((h.prefill, h.decode) for h in list(self.heard) if h.started >= since)

    def wait_for(self, number: int, timeout_s: float = 300.0) -> None:
        """Until this many more answers have ended."""
        wanted = len(self.heard) + number
        wait_until(lambda: len(self.heard) >= wanted or not self._thread.is_alive(), timeout_s, f"{wanted} answers")

    def wait_streaming(self, number: int, replica_id: str | None = None, timeout_s: float = 120.0) -> None:
        """Until this many answers have begun to come and have not ended, on one decode replica or all."""
        what = f"{number} open streams on {replica_id or 'any replica'}"
        wait_until(lambda: self.streaming(replica_id) >= number, timeout_s, what, 0.01)

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as exc:  # raised again by stop(), in the thread that reads the numbers
            self._problem = exc

    async def _run(self) -> None:
        timeout = httpx.Timeout(self._timeout_s, connect=10.0)
        limits = httpx.Limits(max_connections=self._num_clients, max_keepalive_connections=self._num_clients)
        async with httpx.AsyncClient(timeout=timeout, limits=limits, headers=self._headers) as client:
            await asyncio.gather(*(self._client(client) for _ in range(self._num_clients)))

    async def _client(self, client: httpx.AsyncClient) -> None:
        while not self._stop.is_set():
            turn = next(self._turn)
            known = self._known[turn % len(self._known)]
            body = {**known.case.body, "cache_salt": f"turn-{turn // len(self._known)}"}
            heard = Heard(known.case.name, time.monotonic())
            self._open[turn] = heard
            await listen(client, self._url, type(known.case)(known.case.name, known.case.path, body), heard)
            if heard.failed is None:
                heard.wrong = difference(known, heard)
            del self._open[turn]
            self.heard.append(heard)
            # A client that is refused at once would otherwise send thousands of requests a second.
            await asyncio.sleep(max(self._pause_s, 0.2 if heard.failed else 0.0))
