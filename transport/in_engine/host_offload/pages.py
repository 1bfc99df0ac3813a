# SPDX-License-Identifier: Apache-2.0
"""Which bytes of the engine's KV tensors belong to which bytes of the host tensors, and the copy between them.

A *block* is the engine's unit. A *chunk* is the tier's unit: `blocks_per_chunk` blocks. Pages are copied as they are,
without padding. Consecutive pages are copied as one. This module knows no jobs and no threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import BlockIDsLoadStoreSpec, CanonicalKVCaches, GPULoadStoreSpec

_MAX_WORDS = 32_000
"""Most elements of one copy. For 32,768 or more torch wakes OpenMP threads. The copying thread would get a team of its
own, beside the team that computes."""


@dataclass(frozen=True)
class Run:
    """Blocks that lie one after another on both sides."""

    block: int
    """First block in the engine's tensors."""
    page: int
    """First page in the host tensors, counted in blocks: chunk times `blocks_per_chunk` plus the place in it."""
    count: int


@dataclass(frozen=True)
class Plan:
    """What one job copies: for each KV cache group its runs."""

    runs: tuple[tuple[Run, ...], ...]
    num_bytes: int


class PageTable:
    """The engine's KV tensors beside the host tensors that keep their pages.

    Args:
        kv_caches: the engine's tensors, each `(num_blocks, page bytes)`.
        host_tensors: one for each of them, int8, `(num_chunks, blocks_per_chunk * page bytes)`; rows may be strided.
        blocks_per_chunk: blocks in one chunk.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, host_tensors: Sequence[torch.Tensor], blocks_per_chunk: int
    ) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._num_blocks = min(int(tensor.tensor.shape[0]) for tensor in kv_caches.tensors)
        self._num_pages = min(int(tensor.shape[0]) for tensor in host_tensors) * blocks_per_chunk
        self._groups = tuple(
            tuple(
                _words(
                    kv_caches.tensors[ref.tensor_idx].tensor,
                    host_tensors[ref.tensor_idx].unflatten(1, (blocks_per_chunk, -1)),
                    ref.page_size_bytes,
                )
                for ref in refs
            )
            for refs in kv_caches.group_data_refs
        )
        self._group_bytes = tuple(sum(ref.page_size_bytes for ref in refs) for refs in kv_caches.group_data_refs)

    def plan(self, blocks: GPULoadStoreSpec, chunks: BlockIDsLoadStoreSpec) -> Plan:
        """What to copy between `blocks` of the engine and `chunks` of the host; the direction is the caller's.

        The first and the last chunk of a group may be matched by fewer blocks than it holds: `block_indices` says at
        which place of the first chunk a group's blocks begin.

        Raises:
            ValueError: the two sides do not describe the same blocks, or name some that do not exist.

        Source:
            vLLM 0.32 `SingleDirectionOffloadingHandler.transfer_async`.
        """
        if not len(blocks.group_sizes) == len(blocks.block_indices) == len(self._groups):
            raise ValueError(f"{len(blocks.group_sizes)} groups of blocks for {len(self._groups)} KV cache groups")
        block_ids, chunk_ids = blocks.block_ids.astype(np.int64), chunks.block_ids.astype(np.int64)
        first_block = first_chunk = num_bytes = 0
        runs = []
        for size, index, block_bytes in zip(blocks.group_sizes, blocks.block_indices, self._group_bytes, strict=True):
            skipped = index % self._blocks_per_chunk if size else 0
            num_chunks = -(-(size + skipped) // self._blocks_per_chunk)
            taken = chunk_ids[first_chunk : first_chunk + num_chunks]
            places = taken[:, np.newaxis] * self._blocks_per_chunk + np.arange(self._blocks_per_chunk)
            pages = places.ravel()[skipped : skipped + size]
            if len(taken) != num_chunks:
                raise ValueError(f"{len(chunk_ids)} chunks are too few for {len(block_ids)} blocks")
            runs.append(tuple(self._runs(block_ids[first_block : first_block + size], pages)))
            first_block, first_chunk, num_bytes = (
                first_block + size,
                first_chunk + num_chunks,
                num_bytes + size * block_bytes,
            )
        if first_chunk != len(chunk_ids):
            raise ValueError(f"{len(chunk_ids)} chunks are too many for {len(block_ids)} blocks")
        return Plan(tuple(runs), num_bytes)

    def _runs(self, block_ids: np.ndarray[Any, Any], pages: np.ndarray[Any, Any]) -> Iterator[Run]:
        if not len(block_ids):
            return
        for ids, end, what in ((block_ids, self._num_blocks, "block"), (pages, self._num_pages, "page")):
            if ids.min() < 0 or ids.max() >= end:
                raise ValueError(f"{what} {ids.min()} to {ids.max()} of {end}")
        breaks = (np.diff(block_ids) != 1) | (np.diff(pages) != 1)
        if self._blocks_per_chunk > 1:
            # Rows of the host tensors may be further apart than a chunk is long.
            breaks |= pages[1:] % self._blocks_per_chunk == 0
        starts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(pages)]
        for start, end in itertools.pairwise(starts):
            yield Run(int(block_ids[start]), int(pages[start]), end - start)

    def copies(self, plan: Plan, *, to_host: bool) -> Iterator[None]:
        """Copies one tensor of the plan at each step, so that the caller may do something else in between.

        Each step is one call into torch, which lets other Python threads run meanwhile.
        """
        for group, runs in zip(self._groups, plan.runs, strict=True):
            if not runs:
                continue
            for kv, host in group:
                here: list[torch.Tensor] = []
                there: list[torch.Tensor] = []
                for run in runs:
                    self._pieces(kv, host, run, here, there)
                torch._foreach_copy_(there, here) if to_host else torch._foreach_copy_(here, there)
                yield

    def _pieces(
        self, kv: torch.Tensor, host: torch.Tensor, run: Run, here: list[torch.Tensor], there: list[torch.Tensor]
    ) -> None:
        width = kv.shape[1]
        at_once = max(1, _MAX_WORDS // width)
        for done in range(0, run.count, at_once):
            count = min(at_once, run.count - done)
            block, (chunk, place) = run.block + done, divmod(run.page + done, self._blocks_per_chunk)
            source = kv[block : block + count]
            target = (
                host[chunk, place : place + count] if self._blocks_per_chunk > 1 else host[chunk : chunk + count, 0]
            )
            if width <= _MAX_WORDS:
                here.append(source)
                there.append(target)
            else:
                here.extend(source.split(_MAX_WORDS, 1))
                there.extend(target.split(_MAX_WORDS, 1))


def _words(kv: torch.Tensor, host: torch.Tensor, page_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides without padding, as 8-byte words where everything is a multiple of 8."""
    kv = kv.view(torch.int8)
    kv = kv.view(kv.shape[0], -1) if kv.ndim != 2 else kv
    offsets = (page_bytes, kv.shape[1], kv.stride(0), kv.storage_offset(), *host.shape[2:], *host.stride()[:2])
    if all(offset % 8 == 0 for offset in (*offsets, host.storage_offset(), kv.data_ptr(), host.data_ptr())):
        return kv.view(torch.int64)[:, : page_bytes // 8], host.view(torch.int64)[:, :, : page_bytes // 8]
    return kv[:, :page_bytes], host[:, :, :page_bytes]
