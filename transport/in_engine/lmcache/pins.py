# SPDX-License-Identifier: Apache-2.0
"""KV blocks that stay pinned while a store reads them, and how many of them may be. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class BlockPool(Protocol):
    """What `Pins` needs of vLLM's block pool."""

    num_gpu_blocks: int
    blocks: Sequence[Any]

    def touch(self, blocks: Sequence[Any]) -> None: ...

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None: ...


class Pins:
    """The blocks that one sink has pinned: up to `share` of the engine's KV blocks. Scheduler thread only."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._pool: BlockPool | None = None
        self.num_blocks = 0
        """A block that two stores read counts twice."""

    def bind(self, pool: BlockPool) -> None:
        """Take the engine's block pool. To be called before any other method."""
        self._pool = pool

    @property
    def limit(self) -> int:
        """Blocks that may be pinned. `pin` does not check it; each sink does, with an exception of its own."""
        return int(self._bound().num_gpu_blocks * self._share)

    def pin(self, block_ids: Sequence[int]) -> None:
        """Keep vLLM from giving the blocks to another request."""
        pool = self._bound()
        pool.touch([pool.blocks[i] for i in block_ids])
        self.num_blocks += len(block_ids)

    def unpin(self, block_ids: Sequence[int]) -> None:
        """Let go of blocks that were pinned together."""
        pool = self._bound()
        # Last block first, as vLLM does: the head of a prompt is the likelier prefix of another one.
        pool.free_blocks([pool.blocks[i] for i in reversed(block_ids)])
        self.num_blocks -= len(block_ids)

    def _bound(self) -> BlockPool:
        assert self._pool is not None, "bind comes first"
        return self._pool
