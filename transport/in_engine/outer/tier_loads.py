# SPDX-License-Identifier: Apache-2.0
"""Loads from tiers that are under way. Only a load that has succeeded becomes an event. Pure; no vLLM imports."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transport.in_engine.protocols import Event


def new_block_ids(blocks: Any) -> set[int]:
    """The blocks of a request that a load may write to: neither the null block nor one with known content.

    Args:
        blocks: vLLM's `KVCacheBlocks`. A block has a hash once its content is known, so the blocks of a prefix hit have
            one. The blocks of a synchronous load have one too and are left out: vLLM schedules its request in the same
            step.
    """
    return {b.block_id for group in blocks.blocks for b in group if not b.is_null and b.block_hash is None}


class TierLoads:
    """One event for each load. Bounded by the requests that wait for a load: `forget` comes with a request's end."""

    def __init__(self) -> None:
        self._under_way: dict[str, tuple[Event, set[int]]] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def started(self, req_id: str, event: Event, block_ids: set[int]) -> None:
        """`event` is to be told when all of `block_ids` have been written."""
        self._under_way[req_id] = (event, block_ids)

    def forget(self, req_id: str) -> None:
        """The request ended; nobody uses what it loaded."""
        self._under_way.pop(req_id, None)

    def ended(
        self, finished: Collection[str], failed: Collection[str], invalid_block_ids: Collection[int]
    ) -> list[Event]:
        """Events of the loads that succeeded.

        Args:
            finished: requests whose load is over on every rank, however it went.
            failed: requests whose load failed.
            invalid_block_ids: blocks that were not written. A rank may report them before other ranks have finished.
        """
        if not self._under_way:
            return []
        if failed or invalid_block_ids:
            invalid = set(invalid_block_ids)
            hit = [i for i, (_, ids) in self._under_way.items() if i in failed or not ids.isdisjoint(invalid)]
            for req_id in hit:
                del self._under_way[req_id]
        over = [self._under_way.pop(req_id, None) for req_id in finished]
        return [load[0] for load in over if load is not None]
