# SPDX-License-Identifier: Apache-2.0
"""vLLM's block pool, as far as references go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass
class Block:
    block_id: int
    ref_cnt: int = 0


class Pool:
    """`num_blocks` blocks that nobody uses."""

    def __init__(self, num_blocks: int) -> None:
        self.num_gpu_blocks = num_blocks
        self.blocks = [Block(i) for i in range(num_blocks)]

    def touch(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Iterable[Block]) -> None:
        for block in ordered_blocks:
            assert block.ref_cnt > 0, "freed twice"
            block.ref_cnt -= 1

    def pinned(self) -> list[int]:
        return [b.block_id for b in self.blocks if b.ref_cnt]
