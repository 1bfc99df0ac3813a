# SPDX-License-Identifier: Apache-2.0
"""Specs of vLLM's OffloadingConnector for a machine without an accelerator, where vLLM's own refuse to start.

`transport.offload` names them as `spec_name` and `spec_module_path` on `platform: cpu`, and never otherwise. The
scheduler side is vLLM's: look-up, eviction, disk and metrics. The workers' copies are this project's.
"""

from __future__ import annotations

import os

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingWorker
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from transport.in_engine.host_offload.memory import (
    drop_name,
    mark_used,
    private_memory,
    region_id,
    remove_stale_regions,
)
from transport.in_engine.host_offload.pages import PageTable
from transport.in_engine.host_offload.worker import HostOffloadingWorker
from transport.in_engine.patches.borrowed import BORROWED
from transport.upstream.guard import require

require(BORROWED, "transport.in_engine.host_offload")


def _check(spec: CPUOffloadingSpec) -> None:
    if spec.num_chunks < 1:
        raise ValueError("offload.cpu_gib does not hold a single chunk of KV; raise it or lower offload.block_tokens")
    if spec.config.canonical_layout:
        raise ValueError("canonical_layout is not supported on platform cpu")


class HostOffloadingSpec(CPUOffloadingSpec):
    """Host memory alone: private memory of each worker, none of it in /dev/shm."""

    _host_worker: OffloadingWorker | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker of this rank. Allocates and touches its share of the host memory, once."""
        if self._host_worker is None:
            _check(self)
            tensors = []
            for tensor in kv_caches.tensors:
                chunk_bytes = tensor.page_size_bytes * self.blocks_per_chunk
                memory = private_memory(self.num_chunks * chunk_bytes)
                tensors.append(memory.view(self.num_chunks, chunk_bytes))
            pages = PageTable(kv_caches, tensors, self.blocks_per_chunk)
            self._host_worker = HostOffloadingWorker(pages, release=tensors.clear)
        return self._host_worker


class HostTieringOffloadingSpec(TieringOffloadingSpec):
    """Host memory with a disk tier behind it: one region that scheduler and workers share.

    The region is a file in /dev/shm until the scheduler, the last to open it, has removed its name.
    """

    _host_worker: OffloadingWorker | None = None

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self._engine_id = region_id(config.engine_id)

    def get_manager(self) -> OffloadingManager:
        """vLLM's manager of both tiers. Removes the region's name.

        vLLM builds the scheduler after the workers have registered their KV and made the region's file. Should the
        scheduler ever come first, it creates the file and keeps the file's name, as vLLM does.
        """
        if self._manager is None:
            _check(self)
            manager = super().get_manager()
            region = self._scheduler_mmap
            if region is not None:
                mark_used(region)
                if not region._creator:
                    drop_name(region)
            return manager
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker of this rank, over its part of the shared region."""
        if self._host_worker is None:
            _check(self)
            remove_stale_regions()
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            mark_used(region)
            tensors = [
                region.create_next_worker_view(tensor.page_size_bytes * self.blocks_per_chunk)
                for tensor in kv_caches.tensors
            ]
            pages = PageTable(kv_caches, tensors, self.blocks_per_chunk)

            def release() -> None:
                tensors.clear()
                if not os.path.exists(region.mmap_path):
                    region._creator = False
                region.cleanup()

            self._host_worker = HostOffloadingWorker(pages, release)
        return self._host_worker
