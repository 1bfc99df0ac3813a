# SPDX-License-Identifier: Apache-2.0
"""Bundles and executor by parallel sizes."""

from __future__ import annotations

from typing import Any

import pytest

from pools.config import CpuConfig
from pools.plan.placement import Placement, placement
from transport.errors import ConfigError

FIRST, REST = {"CPU": 1.0, "GPU": 1.0}, {"GPU": 1.0}


@pytest.mark.parametrize(
    ("tp", "pp", "num_bundles", "strategy", "executor", "actor_gpus"),
    [
        pytest.param(1, 1, 1, "STRICT_PACK", "uni", 1.0, id="one GPU"),
        pytest.param(2, 1, 2, "STRICT_PACK", "ray", 0.0, id="two ranks on one node"),
        pytest.param(8, 1, 8, "STRICT_PACK", "ray", 0.0, id="a whole node"),
        pytest.param(1, 2, 2, "PACK", "ray", 0.0, id="two stages"),
        pytest.param(4, 2, 8, "PACK", "ray", 0.0, id="stages may span nodes"),
    ],
)
def test_cuda(tp: int, pp: int, num_bundles: int, strategy: str, executor: str, actor_gpus: float) -> None:
    """A rank takes a bundle with one GPU; the actor takes that GPU only when it is the only rank."""
    kwargs = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    assert placement("cuda", kwargs, CpuConfig()) == Placement(
        (FIRST, *[REST] * (num_bundles - 1)),
        strategy,  # type: ignore[arg-type]
        executor,  # type: ignore[arg-type]
        {"num_cpus": 1.0, "num_gpus": actor_gpus},
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_cpu(tp: int) -> None:
    """On CPU an engine is one bundle, whatever its ranks."""
    assert placement("cpu", {"tensor_parallel_size": tp}, CpuConfig(num_cpus=0.25)) == Placement(
        ({"CPU": 0.25},), "STRICT_PACK", "mp", {"num_cpus": 0.25}
    )


def test_sizes_default_to_one() -> None:
    """Without parallel sizes an engine is one rank."""
    assert placement("cuda", {}, CpuConfig()).bundles == (FIRST,)


@pytest.mark.parametrize("size", [0, -1, "4", 2.0, True, None])
def test_impossible_size(size: Any) -> None:
    """A parallel size that is no positive whole number is refused by name."""
    with pytest.raises(ConfigError, match="tensor_parallel_size") as caught:
        placement("cuda", {"tensor_parallel_size": size}, CpuConfig())
    assert caught.value.path == "tensor_parallel_size"
