# SPDX-License-Identifier: Apache-2.0
"""Which changes of a config keep old and new engines from using each other's KV."""

from __future__ import annotations

from typing import Any

import pytest

from pools.config import CpuConfig, FakeEngineConfig, ModelConfig, PoolConfig
from pools.replica.kv_digest import kv_fit
from pools.replica.spec import ReplicaSpec
from transport.config import NixlConfig


def spec(source: str = "a/model", pool: dict[str, Any] | None = None, **engine_kwargs: Any) -> ReplicaSpec:
    return ReplicaSpec(
        model=ModelConfig(id="tiny", source=source, engine_kwargs=engine_kwargs),
        platform="cpu",
        engine=FakeEngineConfig(type="fake"),
        cpu=CpuConfig(),
        transport=NixlConfig(),
        pool=PoolConfig(engine_kwargs=pool or {}),
    )


@pytest.mark.parametrize("other", [{"max_model_len": 4096}, {"pool": {"max_num_seqs": 8}}, {"seed": 3}])
def test_the_same_kv(other: dict[str, Any]) -> None:
    """Arguments that do not change the KV of a token."""
    assert kv_fit(spec()) == kv_fit(spec(**other))


@pytest.mark.parametrize("other", [{"source": "b/model"}, {"dtype": "float32"}, {"block_size": 64}, {"revision": "v2"}])
def test_other_kv(other: dict[str, Any]) -> None:
    """Other weights, other numbers or another layout."""
    assert kv_fit(spec()) != kv_fit(spec(**other))
