# SPDX-License-Identifier: Apache-2.0
"""Queues of vLLM's that leave nothing in shared memory, whatever ends their processes."""

from __future__ import annotations

import threading

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from pools.process.shared_files import SHARED_MEMORY
from transport.in_engine.patches.nameless import nameless


def test_a_queue_loses_its_name_once_all_readers_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages pass as before, and taking it down finds nothing to complain of."""
    monkeypatch.setattr(MessageQueue, "wait_until_ready", nameless(MessageQueue.wait_until_ready))
    writer = MessageQueue(n_reader=1, n_local_reader=1, max_chunk_bytes=1024, max_chunks=4)
    file = SHARED_MEMORY / writer.buffer.shared_memory.name
    assert file.exists()
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    waiting = threading.Thread(target=writer.wait_until_ready)
    waiting.start()
    reader.wait_until_ready()
    waiting.join(10)
    assert not waiting.is_alive() and not file.exists()
    for number in range(9):
        writer.enqueue({"number": number}, timeout=5)
        assert reader.dequeue(timeout=5) == {"number": number}
    writer.buffer.__del__()
