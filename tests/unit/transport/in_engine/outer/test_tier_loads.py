# SPDX-License-Identifier: Apache-2.0
"""A load is told of when it has succeeded, and only then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from transport.in_engine.outer.tier_loads import TierLoads, new_block_ids

EVENT = {"kind": "loaded", "tokens": 8}


def test_a_load_is_told_once_when_it_is_over() -> None:
    """Not at its start, and not again when the id comes back."""
    loads = TierLoads()
    loads.started("r", EVENT, {1, 2})
    assert loads.ended((), (), ()) == []
    assert loads.ended({"other"}, {"other"}, {9}) == []
    assert loads.ended({"r"}, (), ()) == [EVENT]
    assert loads.ended({"r"}, (), ()) == [] and len(loads) == 0


@pytest.mark.parametrize(("failed", "invalid"), [({"r"}, ()), ((), {2, 5}), ({"r"}, {2})])
def test_a_load_that_failed_is_not_told(failed: Any, invalid: Any) -> None:
    """Whether vLLM hears of it as a request or as blocks, in the same step or before."""
    for before in (True, False):
        loads = TierLoads()
        loads.started("r", EVENT, {1, 2})
        if before:
            assert loads.ended((), failed, invalid) == []
            assert loads.ended({"r"}, (), ()) == []
        else:
            assert loads.ended({"r"}, failed, invalid) == []
        assert len(loads) == 0


def test_a_request_that_ended_loads_nothing() -> None:
    """Aborted while it waits: the load ends later and nobody uses it."""
    loads = TierLoads()
    loads.started("r", EVENT, {1})
    loads.forget("r")
    loads.forget("other")
    assert len(loads) == 0 and loads.ended({"r"}, (), ()) == []


def test_only_new_blocks_are_loaded_into() -> None:
    """Neither the null block nor one of a prefix hit, in any group."""

    def block(block_id: int, block_hash: bytes | None = None) -> Any:
        return SimpleNamespace(block_id=block_id, block_hash=block_hash, is_null=block_id == 0)

    blocks = SimpleNamespace(blocks=([block(3, b"h"), block(4)], [block(0), block(5)]))
    assert new_block_ids(blocks) == {4, 5}
