# SPDX-License-Identifier: Apache-2.0
"""Arguments and environment of one engine."""

from __future__ import annotations

from typing import Any

import pytest

from pools.config import CpuConfig, ModelConfig, Platform, PoolConfig
from pools.plan.launch import HOST_WORKER_EXTENSION, engine_args, engine_env
from pools.plan.placement import placement

KV = {"kv_connector": "MultiConnector"}


def args(platform: Platform, model: dict[str, Any], pool: dict[str, Any]) -> dict[str, Any]:
    return engine_args(
        ModelConfig(id="tiny", source="/models/tiny", engine_kwargs=model),
        PoolConfig(engine_kwargs=pool),
        platform=platform,
        kv_transfer_config=KV,
        placement=placement(platform, {**model, **pool}, CpuConfig()),
    )


def test_cpu_defaults() -> None:
    """A CPU engine runs eagerly in bfloat16 and loads what mends vLLM on a host without accelerator."""
    assert args("cpu", {}, {}) == {
        "enforce_eager": True,
        "dtype": "bfloat16",
        "enable_prompt_tokens_details": True,
        "model": "/models/tiny",
        "served_model_name": ["tiny"],
        "distributed_executor_backend": "mp",
        "kv_transfer_config": KV,
        "worker_extension_cls": HOST_WORKER_EXTENSION,
    }


def test_cpu_defaults_can_be_changed() -> None:
    """What the user sets wins over the platform's defaults."""
    assert args("cpu", {"dtype": "float32"}, {"enforce_eager": False}).items() >= {
        ("dtype", "float32"),
        ("enforce_eager", False),
    }


def test_cuda_adds_no_defaults() -> None:
    """On CUDA vLLM's own defaults stand, but for cached tokens, which answers show."""
    assert args("cuda", {}, {}) == {
        "enable_prompt_tokens_details": True,
        "model": "/models/tiny",
        "served_model_name": ["tiny"],
        "distributed_executor_backend": "uni",
        "kv_transfer_config": KV,
    }


def test_pool_wins_over_model() -> None:
    """A pool's own arguments replace the model's and leave the others."""
    merged = args("cuda", {"max_num_seqs": 8, "max_model_len": 99}, {"max_num_seqs": 16})
    assert (merged["max_num_seqs"], merged["max_model_len"]) == (16, 99)


@pytest.mark.parametrize(
    ("platform", "extra"),
    [
        ("cuda", {}),
        (
            "cpu",
            {
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": "3",
                "DISAGG_FORK_WORKERS": "1",
            },
        ),
    ],
)
def test_environment(platform: Platform, extra: dict[str, str]) -> None:
    """Every engine knows its address and sends no statistics; a CPU engine also its KV space and threads."""
    assert engine_env(platform, CpuConfig(kv_cache_gib=2, omp_threads=3), host="10.0.0.5") == {
        "DISAGG_ENGINE_PLATFORM": platform,
        "VLLM_HOST_IP": "10.0.0.5",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **extra,
    }
