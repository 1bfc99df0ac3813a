# SPDX-License-Identifier: Apache-2.0
"""The sink `write_through`: every chunk of every prompt is stored, each store on its own. Pure.

LMCache's plain mode has one store per request, under the request's id, and keeps the request's blocks by holding the
request itself back. Loads, aborts and readers of the request have the same id and got mixed up with the store: blocks
were freed while a copy still read them. Here a store has an id of its own. It pins the blocks that it reads as soon as
it is made, goes out with the metadata of the same step, and unpins the blocks when every rank has reported. No request
waits for its stores.

A store that does not fit or fails is dropped, never retried. Its prompt then has a hole. A look-up ends at the first
chunk that is missing, so it does not find the chunks behind the hole. The hole is filled when another request with the
same beginning computes and stores the missing chunk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transport.in_engine.lmcache.pins import BlockPool, Pins

logger = logging.getLogger(__name__)

MAX_PINNED_SHARE = 0.5
"""Share of the KV blocks that stores may pin. Most of the pinned blocks belong to running requests as well."""

MakeStore = Callable[[str, Any], tuple[Any, tuple[int, ...]] | None]
"""Takes a store id and LMCache's metadata. Returns the metadata to send and the blocks that the store reads, or None
when there are none."""


@dataclass
class _UnderWay:
    block_ids: tuple[int, ...]
    deadline: float
    reports: int = 0


class WriteThrough:
    """The stores of one engine. Scheduler thread only.

    Args:
        make_store: see `MakeStore`.
        is_healthy: whether the tier answers.
        num_ranks: reports that settle a store.
        deadline_s: seconds the reports may take. Must be longer than a rank takes to give up, as for a rescue.
    """

    def __init__(
        self,
        *,
        make_store: MakeStore,
        is_healthy: Callable[[], bool],
        num_ranks: int,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_store = make_store
        self._is_healthy = is_healthy
        self._num_ranks = num_ranks
        self._deadline_s = deadline_s
        self._clock = clock
        self._pins = Pins(MAX_PINNED_SHARE)
        self._new: list[Any] = []
        self._under_way: dict[str, _UnderWay] = {}
        self._made = 0
        self.num_dropped = 0
        """Stores that were not made, for want of room or of a server."""

    @property
    def num_pinned_blocks(self) -> int:
        """Pins; a block that two stores read counts twice."""
        return self._pins.num_blocks

    def bind(self, pool: BlockPool) -> None:
        """Take the engine's block pool. To be called before any other method."""
        self._pins.bind(pool)

    def add(self, metadata: Any) -> None:
        """Chunks that the step being scheduled completes; `next_stores` of the same step sends them."""
        self._made += 1
        made = self._make_store(f"{metadata.request_id}/through-{self._made}", metadata)
        if made is None:
            return
        to_send, block_ids = made
        if not self._is_healthy() or not self._has_room(len(block_ids)):
            self.num_dropped += 1
            if self.num_dropped == 1:
                logger.warning(
                    "a store of the shared tier is dropped, for the server is lost or half of the KV blocks wait for "
                    "it; later ones are only counted"
                )
            return
        self._pins.pin(block_ids)
        self._under_way[to_send.request_id] = _UnderWay(block_ids, self._clock() + self._deadline_s)
        self._new.append(to_send)

    def next_stores(self) -> list[Any]:
        """The metadata to send with this step. Gives up late stores, which no rank will report any more."""
        now = self._clock()
        late = [store_id for store_id, store in self._under_way.items() if store.deadline <= now]
        for store_id in late:
            self._settle(store_id)
        if late:
            logger.warning("%d stores of the shared tier were not reported in time", len(late))
        new, self._new = self._new, []
        return new

    def is_under_way(self, store_id: str) -> bool:
        """Whether `store_id` names a store of this sink that is not settled."""
        return store_id in self._under_way

    def report(self, done: Mapping[str, int]) -> list[str]:
        """Count the ranks' reports, of failed stores too; returns the store ids that are settled."""
        settled = []
        for store_id, count in done.items():
            store = self._under_way.get(store_id)
            if store is None:
                continue
            store.reports += count
            if store.reports >= self._num_ranks:
                self._settle(store_id)
                settled.append(store_id)
        return settled

    def has_work(self) -> bool:
        """Whether blocks are pinned, so that the engine must keep stepping."""
        return bool(self._under_way)

    def _has_room(self, num_blocks: int) -> bool:
        """A store always fits when no other store is under way: its own request uses its blocks anyway."""
        pinned = self._pins.num_blocks
        return not pinned or pinned + num_blocks <= self._pins.limit

    def _settle(self, store_id: str) -> None:
        self._pins.unpin(self._under_way.pop(store_id).block_ids)
