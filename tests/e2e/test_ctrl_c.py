# SPDX-License-Identifier: Apache-2.0
"""The end of an application."""

from __future__ import annotations

import os

import httpx
import pytest

from pools.process.shared_files import SHARED_MEMORY
from tests.e2e.conftest import FakeStack
from tests.support.slot import Slot


def test_ctrl_c_leaves_nothing(fake_stack: FakeStack, slot: Slot) -> None:
    """After Ctrl-C `disagg serve` ends with 0, and no process, port or shared memory of it is left.

    The last test of its application, because it ends it.
    """
    stack = fake_stack.stack
    with stack.client() as client:
        pids = [r.pid for pool in client.pools() for r in pool.replicas if r.pid]
    assert len(pids) == 2
    code, _ = stack.stop()
    slot.empty()
    assert code == 0, stack.output[-20:]
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{stack.url}/health", timeout=5)
    assert set(SHARED_MEMORY.iterdir()) <= fake_stack.shared_before
