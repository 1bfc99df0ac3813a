# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of one engine go: placement-group bundles from its parallel sizes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pools.config import CpuConfig, Platform
from transport.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """What one replica asks of Ray, and how vLLM spreads its ranks over that."""

    bundles: tuple[dict[str, float], ...]
    """Placement-group bundles; the replica's actor lives in the first."""
    strategy: Literal["PACK", "STRICT_PACK"]
    """STRICT_PACK keeps all ranks on one node."""
    distributed_executor_backend: Literal["uni", "mp", "ray"]
    """vLLM's executor."""
    actor_options: dict[str, float]
    """`ray_actor_options` of the replica, within the first bundle. With the `ray` executor the actor takes no GPU,
    because a rank of the engine takes the one in its bundle."""


def placement(platform: Platform, engine_kwargs: Mapping[str, Any], cpu: CpuConfig) -> Placement:
    """Bundles and executor for one engine with these (merged) arguments.

    Tensor-parallel ranks talk on every layer, so they stay on one node; pipeline stages may span nodes.

    Raises:
        ConfigError: a parallel size is not a positive integer.
    """
    pp = parallel_size(engine_kwargs, "pipeline_parallel_size")
    world_size = parallel_size(engine_kwargs, "tensor_parallel_size") * pp
    if platform == "cpu":
        return Placement(({"CPU": cpu.num_cpus},), "STRICT_PACK", "mp", {"num_cpus": cpu.num_cpus})
    if world_size == 1:
        return Placement(({"CPU": 1.0, "GPU": 1.0},), "STRICT_PACK", "uni", {"num_cpus": 1.0, "num_gpus": 1.0})
    ranks: tuple[dict[str, float], ...] = tuple({"GPU": 1.0} for _ in range(world_size - 1))
    strategy: Literal["PACK", "STRICT_PACK"] = "STRICT_PACK" if pp == 1 else "PACK"
    return Placement(({"CPU": 1.0, "GPU": 1.0}, *ranks), strategy, "ray", {"num_cpus": 1.0, "num_gpus": 0.0})


def parallel_size(engine_kwargs: Mapping[str, Any], key: str) -> int:
    """The value of `key`, 1 when absent. Raises ConfigError unless it is a positive integer."""
    size = engine_kwargs.get(key, 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"{key} is {size!r}, but must be a whole number from 1", path=key)
    return size
