# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker contract of a KV tier, for host tensors on a machine without an accelerator.

One thread copies. Copies of one direction run in the order of their submission. A request waits for a load and nobody
waits for a store, so loads go before stores, and also between the tensors of a store that is running. That order is
safe. vLLM has waited for every store of a block before it loads into the block, and it loads only chunks whose store it
has seen finished. There are no streams to order: on a CPU a forward pass is over when vLLM submits the store of its KV.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from transport.in_engine.host_offload.pages import PageTable, Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    job_id: int
    plan: Plan
    is_store: bool


class HostOffloadingWorker(OffloadingWorker):
    """Copies KV pages between the engine's tensors and host tensors, on a thread of its own.

    A copy touches only memory that exists since the start, so it does not fail. Should a copy raise all the same, the
    worker reports its job as failed, and vLLM then ends the engine: the engine's KV would be wrong.

    Args:
        pages: the tensors of both sides.
        release: called once after the last copy; gives the host memory back.
    """

    def __init__(self, pages: PageTable, release: Callable[[], None]) -> None:
        self._pages: PageTable | None = pages
        self._release = release
        self._changed = threading.Condition()
        self._loads: deque[_Job] = deque()
        self._stores: deque[_Job] = deque()
        self._unfinished: set[int] = set()
        self._finished: deque[TransferResult] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-offload", daemon=True)
        self._thread.start()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Queues a copy from the engine to the host. Does not wait."""
        return self._submit(job_id, src_spec, dst_spec, is_store=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Queues a copy from the host to the engine. Does not wait."""
        return self._submit(job_id, dst_spec, src_spec, is_store=False)

    def get_finished(self) -> list[TransferResult]:
        """The jobs that ended since the last call. Takes no lock: the engine asks on every step."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def wait(self, job_ids: set[int]) -> None:
        """Blocks until none of `job_ids` is queued or running. Unknown ids count as finished."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._unfinished.isdisjoint(job_ids))

    def shutdown(self) -> None:
        """Ends the thread after the copy it is at, forgets the others, and gives the host memory back. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._pages = None
        self._release()

    def _submit(self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec, *, is_store: bool) -> bool:
        if not isinstance(chunks, BlockIDsLoadStoreSpec):
            raise TypeError(f"host chunks are named by a BlockIDsLoadStoreSpec, not by {type(chunks).__name__}")
        if self._pages is None:
            return False
        job = _Job(job_id, self._pages.plan(blocks, chunks), is_store)
        with self._changed:
            if self._closed:
                return False
            (self._stores if is_store else self._loads).append(job)
            self._unfinished.add(job_id)
            self._changed.notify_all()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._loads or self._stores)
                if self._closed:
                    return
                job = (self._loads or self._stores).popleft()
            self._copy(job)

    def _copy(self, job: _Job) -> None:
        pages = self._pages
        assert pages is not None
        busy_s, success = 0.0, True
        try:
            copies = pages.copies(job.plan, to_host=job.is_store)
            while True:
                started = time.perf_counter()
                try:
                    next(copies)
                except StopIteration:
                    break
                busy_s += time.perf_counter() - started
                while job.is_store and self._loads:
                    self._copy(self._loads.popleft())
        except Exception:
            logger.exception("KV offload job %d failed", job.job_id)
            success = False
        self._finished.append(TransferResult(job.job_id, success, job.plan.num_bytes, busy_s))
        with self._changed:
            self._unfinished.discard(job.job_id)
            self._changed.notify_all()
