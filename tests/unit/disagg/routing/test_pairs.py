# SPDX-License-Identifier: Apache-2.0
"""Which replicas may be a pair."""

from __future__ import annotations

from dataclasses import replace

from disagg.routing.pairs import misfit
from disagg.routing.views import ReplicaInfo

P0 = ReplicaInfo("p0", "prefill", "http://p0", "e", "1", 16, 1000, kv_fit="a")
D0 = ReplicaInfo("d0", "decode", "http://d0", "e", "2", 16, 1000, kv_fit="a")


def test_a_pair() -> None:
    """The same blocks, vocabulary and arguments."""
    assert misfit(P0, D0) is None


def test_no_pair() -> None:
    """Each difference has its words."""
    assert "16 and 32" in (misfit(P0, replace(D0, block_size=32)) or "")
    assert "1000 and 2000" in (misfit(P0, replace(D0, vocab_size=2000)) or "")
    assert "arguments" in (misfit(P0, replace(D0, kv_fit="b")) or "")
