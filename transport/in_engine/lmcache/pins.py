# SPDX-License-Identifier: Apache-2.0
"""KV blocks that stay pinned while a store reads them, and how many of them may be. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class BlockPool(Protocol):
    """What is needed of vLLM's block pool."""

    num_gpu_blocks: int
    blocks: Sequence[Any]

    def touch(self, blocks: Sequence[Any]) -> None: ...

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None: ...


class Pins:
    """The pins of one sink, which may be `share` of the engine's KV blocks. Scheduler thread only."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._pool: BlockPool | None = None
        self.num_blocks = 0
        """A block that two stores read counts twice."""

    def bind(self, pool: BlockPool) -> None:
        """The engine's block pool, before anything else."""
        self._pool = pool

    @property
    def limit(self) -> int:
        """Blocks that may be pinned. Whoever pins keeps to it; each sink has an exception of its own."""
        return int(self._bound().num_gpu_blocks * self._share)

    def pin(self, block_ids: Sequence[int]) -> None:
        """Keep the blocks from being used again."""
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
