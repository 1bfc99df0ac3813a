# SPDX-License-Identifier: Apache-2.0
"""From pool settings to the arguments and environment of one vLLM engine. Pure.

vLLM's names are used throughout. Which of them exist is in `pools.plan.engine_kwargs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pools.config import CpuConfig, ModelConfig, Platform, PoolConfig
from pools.plan.placement import Placement

HOST_WORKER_EXTENSION = "transport.in_engine.patches.worker.HostWorkerExtension"
"""Loaded in the workers on a machine without an accelerator, and only there."""
PLATFORM_VARIABLE = "DISAGG_ENGINE_PLATFORM"
"""By this variable `transport.in_engine.plugin` knows our engines among all that run in the Python environment."""

FORK_VARIABLE = "DISAGG_FORK_WORKERS"
"""Set for the plugin, too: EngineCore is to fork the workers of this engine."""

ROOT_CAUSE_VARIABLE = "DISAGG_ROOT_CAUSE_FILE"
"""Names the file in which the processes of an engine note why they fail, for the replica that owns it."""

_SPAWNED_WITH = ("mm_tensor_ipc", "numa_bind", "otlp_traces_endpoint")
"""Arguments with which vLLM's workers have to be spawned: they share tensors by torch, are bound to NUMA nodes as they
start, or have a tracer that EngineCore has, too."""
_DEFAULTS: dict[str, Any] = {"enable_prompt_tokens_details": True}
"""vLLM's default hides cached tokens, which OpenAI's answers show."""
_CPU_DEFAULTS: dict[str, Any] = {"enforce_eager": True, "dtype": "bfloat16"}


def merged_engine_kwargs(model: ModelConfig, pool: PoolConfig, platform: Platform) -> dict[str, Any]:
    """The user's arguments for one pool: platform defaults, then the model's, then the pool's own."""
    defaults = _CPU_DEFAULTS if platform == "cpu" else {}
    return {**_DEFAULTS, **defaults, **model.engine_kwargs, **pool.engine_kwargs}


def engine_args(
    model: ModelConfig,
    pool: PoolConfig,
    *,
    platform: Platform,
    kv_transfer_config: Mapping[str, Any],
    placement: Placement,
) -> dict[str, Any]:
    """Every argument of one engine, engine and OpenAI server alike, JSON-able if the user's are.

    Source:
        vLLM 0.32 `AsyncEngineArgs` and `FrontendArgs`.
    """
    args = {
        **merged_engine_kwargs(model, pool, platform),
        "model": model.source,
        "served_model_name": [model.id],
        "distributed_executor_backend": placement.distributed_executor_backend,
        "kv_transfer_config": dict(kv_transfer_config),
    }
    if platform == "cpu":
        args["worker_extension_cls"] = HOST_WORKER_EXTENSION
    return args


def engine_env(
    platform: Platform,
    cpu: CpuConfig,
    *,
    host: str,
    engine_kwargs: Mapping[str, Any] | None = None,
    given: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Environment of one engine's process, to be set before vLLM is imported.

    The OpenMP threads are not bound to cores: with bound ones two engines on a small machine share one core.

    Args:
        host: address of the replica's node, as other nodes reach it.
        engine_kwargs: the engine's merged arguments.
        given: the environment that the process has already. `VLLM_WORKER_MULTIPROC_METHOD=spawn` is kept.
    """
    env = {PLATFORM_VARIABLE: platform, "VLLM_HOST_IP": host, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if platform == "cpu":
        env["VLLM_CPU_KVCACHE_SPACE"] = str(cpu.kv_cache_gib)
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        env["OMP_NUM_THREADS"] = str(cpu.omp_threads)
        asked_for = (given or {}).get("VLLM_WORKER_MULTIPROC_METHOD") == "spawn"
        needed = any((engine_kwargs or {}).get(name) for name in _SPAWNED_WITH)
        env[FORK_VARIABLE] = "0" if asked_for or needed else "1"
    return env
