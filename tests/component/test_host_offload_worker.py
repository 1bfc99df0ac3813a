# SPDX-License-Identifier: Apache-2.0
"""The worker of the host-memory tier against vLLM's contract of an `OffloadingWorker`, without an engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from transport.in_engine.host_offload import memory as host_offload_memory
from transport.in_engine.host_offload.pages import PageTable
from transport.in_engine.host_offload.worker import HostOffloadingWorker

BLOCKS, CHUNKS = 40, 60


class Rig:
    """KV tensors with known bytes, host tensors without any, and a worker between them."""

    def __init__(
        self, *, per_chunk: int = 1, page: int = 64, strided: bool = False, refs: Any = None, padding: int = 0
    ) -> None:
        self.per_chunk, self.page = per_chunk, page
        self.kv = [torch.randint(-128, 127, (BLOCKS, page), dtype=torch.int8) for _ in range(3)]
        width = page * per_chunk
        if strided:  # As in vLLM's shared region: the tensors of a chunk side by side.
            rows = torch.zeros((CHUNKS, width * 3 + 40), dtype=torch.int8)
            self.host = [rows[:, i * width : (i + 1) * width] for i in range(3)]
        else:
            self.host = [torch.zeros((CHUNKS, width), dtype=torch.int8) for _ in range(3)]
        refs = refs or [[0, 1, 2]]
        self.caches = CanonicalKVCaches(
            tensors=[CanonicalKVCacheTensor(tensor, page) for tensor in self.kv],
            group_data_refs=[[CanonicalKVCacheRef(i, page - padding) for i in group] for group in refs],
        )
        self.table = PageTable(self.caches, self.host, per_chunk)
        self.released: list[bool] = []
        self.worker = HostOffloadingWorker(self.table, release=lambda: self.released.append(True))

    def host_page(self, tensor: int, page: int) -> torch.Tensor:
        chunk, place = divmod(page, self.per_chunk)
        return self.host[tensor][chunk, place * self.page : (place + 1) * self.page]

    def finish(self, jobs: int) -> dict[int, Any]:
        done: dict[int, Any] = {}
        deadline = time.monotonic() + 20
        while len(done) < jobs and time.monotonic() < deadline:
            done |= {result.job_id: result for result in self.worker.get_finished()}
        assert len(done) == jobs
        return done


@pytest.fixture
def rigs() -> Iterator[list[Rig]]:
    made: list[Rig] = []
    yield made
    for rig in made:
        rig.worker.shutdown()


def one_group(block_ids: list[int], index: int = 0) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(block_ids, group_sizes=[len(block_ids)], block_indices=[index])


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("per_chunk", [1, 4])
@pytest.mark.parametrize("page", [64, 30, 300_000])
def test_random_blocks_come_back(rigs: list[Rig], per_chunk: int, strided: bool, page: int) -> None:
    """Blocks stored in random places and loaded into other random blocks hold the same bytes, and no other block
    changed; with partial first and last chunks, rows apart, odd page sizes and pages larger than one copy."""
    rng = np.random.default_rng(per_chunk * 7 + page)
    rigs.append(rig := Rig(per_chunk=per_chunk, page=page, strided=strided))
    for _ in range(20):
        before = [tensor.clone() for tensor in rig.kv]
        count, index = int(rng.integers(1, 14)), int(rng.integers(0, 9))
        num_chunks = -(-(count + index % per_chunk) // per_chunk)
        start = int(rng.integers(0, BLOCKS - count))
        source = list(range(start, start + count)) if rng.random() < 0.5 else rng.permutation(BLOCKS)[:count].tolist()
        chunks = rng.permutation(CHUNKS)[:num_chunks].tolist()
        target = rng.permutation(BLOCKS)[:count].tolist()
        assert rig.worker.submit_store(1, one_group(source, index), CPULoadStoreSpec(chunks))
        rig.worker.wait({1})
        pages = [c * per_chunk + p for c in chunks for p in range(per_chunk)][index % per_chunk :][:count]
        for i, tensor in enumerate(before):
            for block, at in zip(source, pages, strict=True):
                assert torch.equal(rig.host_page(i, at), tensor[block])
        assert rig.worker.submit_load(2, CPULoadStoreSpec(chunks), one_group(target, index))
        done = rig.finish(2)
        for i, tensor in enumerate(before):
            tensor[target] = tensor[source]
            assert torch.equal(rig.kv[i], tensor)
        assert [done[j].success for j in (1, 2)] == [True, True]
        assert done[1].transfer_size == done[2].transfer_size == count * 3 * page
        assert done[1].transfer_time > 0


def test_groups_take_their_own_tensors(rigs: list[Rig]) -> None:
    """With several KV cache groups each copies the tensors of its own layers, from its own place in its first chunk;
    an empty group copies nothing."""
    rigs.append(rig := Rig(per_chunk=2, refs=[[0], [1, 2], [0]]))
    spec = GPULoadStoreSpec([5, 6, 7, 9], group_sizes=[3, 1, 0], block_indices=[1, 4, 0])
    rig.worker.submit_store(1, spec, CPULoadStoreSpec([10, 20, 30]))
    done = rig.finish(1)
    assert done[1].transfer_size == (3 + 2) * rig.page
    expected = {(0, 21): 5, (0, 40): 6, (0, 41): 7, (1, 60): 9, (2, 60): 9}
    for (tensor, page), block in expected.items():
        assert torch.equal(rig.host_page(tensor, page), rig.kv[tensor][block])
    assert sum(int(host.count_nonzero()) for host in rig.host) == sum(
        int(rig.kv[tensor][block].count_nonzero()) for (tensor, _), block in expected.items()
    )


def test_padding_is_not_copied(rigs: list[Rig]) -> None:
    """Only the part of a page that a layer uses is copied and counted."""
    rigs.append(rig := Rig(padding=16))
    rig.worker.submit_store(1, one_group([3, 4]), CPULoadStoreSpec([0, 1]))
    assert rig.finish(1)[1].transfer_size == 2 * 3 * (rig.page - 16)
    assert torch.equal(rig.host[0][0, :-16], rig.kv[0][3, :-16])
    assert int(rig.host[0][0, -16:].count_nonzero()) == 0


def test_many_jobs_at_once(rigs: list[Rig]) -> None:
    """Hundreds of jobs queued together all end once, each reported once, and the last store of a chunk wins."""
    rigs.append(rig := Rig(page=4096))
    for job in range(500):
        rig.worker.submit_store(job, one_group([job % BLOCKS]), CPULoadStoreSpec([7]))
    done = rig.finish(500)
    assert all(result.success for result in done.values())
    assert torch.equal(rig.host[1][7], rig.kv[1][499 % BLOCKS])
    assert rig.worker.get_finished() == []


def test_submitting_does_not_wait_and_waiting_does(rigs: list[Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A submit returns while the copy is held up; `wait` returns when it is over, and at once for unknown jobs."""
    rigs.append(rig := Rig())
    gate = threading.Event()
    copies = rig.table.copies

    def held(*args: Any, **kwargs: Any) -> Iterator[None]:
        gate.wait(20)
        yield from copies(*args, **kwargs)

    monkeypatch.setattr(rig.table, "copies", held)
    rig.worker.submit_store(1, one_group([3]), CPULoadStoreSpec([0]))
    rig.worker.wait({99})
    assert rig.worker.get_finished() == []
    threading.Timer(0.2, gate.set).start()
    rig.worker.wait({1, 99})
    assert gate.is_set()
    assert torch.equal(rig.host[0][0], rig.kv[0][3])
    assert [result.job_id for result in rig.worker.get_finished()] == [1]


def test_a_load_goes_before_stores(rigs: list[Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A load overtakes queued stores, and the one that is being copied at its next tensor."""
    rigs.append(rig := Rig())
    reached, go_on = threading.Event(), threading.Event()
    copies = rig.table.copies

    def slow(plan: Any, *, to_host: bool) -> Iterator[None]:
        for step in copies(plan, to_host=to_host):
            if to_host:
                reached.set()
                go_on.wait(20)
            yield step

    monkeypatch.setattr(rig.table, "copies", slow)
    rig.worker.submit_store(1, one_group([3]), CPULoadStoreSpec([0]))
    rig.worker.submit_store(2, one_group([4]), CPULoadStoreSpec([1]))
    assert reached.wait(20)
    rig.worker.submit_load(3, CPULoadStoreSpec([50]), one_group([9]))
    go_on.set()
    order: list[int] = []
    while len(order) < 3:
        order += [result.job_id for result in rig.worker.get_finished()]
    assert order == [3, 1, 2]


@pytest.mark.parametrize(
    ("blocks", "chunks"),
    [
        (one_group([0, 1, 2]), [4, 5]),
        (one_group([0]), [4, 5]),
        (one_group([BLOCKS]), [0]),
        (one_group([-1]), [0]),
        (one_group([0]), [CHUNKS]),
        (GPULoadStoreSpec([0, 1], group_sizes=[1, 1], block_indices=[0, 0]), [0, 1]),
    ],
    ids=["too few chunks", "too many chunks", "no such block", "negative block", "no such chunk", "too many groups"],
)
def test_a_wrong_job_is_refused(rigs: list[Rig], blocks: GPULoadStoreSpec, chunks: list[int]) -> None:
    """A job that names memory which is not there is refused when it is submitted; nothing is copied."""
    rigs.append(rig := Rig())
    with pytest.raises(ValueError):
        rig.worker.submit_store(1, blocks, CPULoadStoreSpec(chunks))
    assert not any(host.any() for host in rig.host)


def test_a_copy_that_raises_is_reported(rigs: list[Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a copy raise, its job ends as failed, nobody waits for ever, and the thread lives on."""
    rigs.append(rig := Rig())
    copies = rig.table.copies
    monkeypatch.setattr(rig.table, "copies", lambda *args, **kwargs: 1 / 0)
    rig.worker.submit_store(1, one_group([3]), CPULoadStoreSpec([0]))
    rig.worker.wait({1})
    monkeypatch.setattr(rig.table, "copies", copies)
    rig.worker.submit_store(2, one_group([3]), CPULoadStoreSpec([0]))
    done = rig.finish(2)
    assert (done[1].success, done[2].success) == (False, True)


def test_shutdown_ends_the_thread_and_gives_memory_back(rigs: list[Rig]) -> None:
    """Shutdown is idempotent, ends the thread, frees waiters and takes no further job."""
    rigs.append(rig := Rig())
    for job in range(50):
        rig.worker.submit_store(job, one_group([3]), CPULoadStoreSpec([0]))
    rig.worker.shutdown()
    rig.worker.shutdown()
    rig.worker.wait(set(range(50)))
    assert rig.released == [True]
    assert not any(thread.name == "kv-offload" for thread in threading.enumerate())
    assert not rig.worker.submit_store(99, one_group([3]), CPULoadStoreSpec([0]))


def test_private_memory_is_there() -> None:
    """The memory is zero, all of it resident before the first copy, and given back with its last reference."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before, size = resident(), 256 * 1024**2
    memory = host_offload_memory.private_memory(size)
    assert resident() - before > 0.95 * size
    assert not memory[:: size // 64].any()
    del memory
    assert resident() - before < 0.1 * size


def test_too_much_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the machine does not have is an error with the size in it."""
    with pytest.raises(MemoryError, match="4194304.00 GiB"):
        host_offload_memory.private_memory(1 << 52)


def test_stale_regions_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the region files only this project's own, old and unused ones are removed."""
    import fcntl
    import os

    names = ("vllm_offload_disagg-a.mmap", "vllm_offload_disagg-used.mmap", "vllm_offload_other.mmap")
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    used = os.open(tmp_path / names[1], os.O_RDWR)
    try:
        fcntl.flock(used, fcntl.LOCK_SH)
        assert host_offload_memory.remove_stale_regions(str(tmp_path)) == []
        monkeypatch.setattr(host_offload_memory, "_STALE_AFTER_S", -1.0)
        assert host_offload_memory.remove_stale_regions(str(tmp_path)) == [str(tmp_path / names[0])]
    finally:
        os.close(used)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
