# SPDX-License-Identifier: Apache-2.0
"""Whether the engines of a config can start: model against arguments, arguments against machine. Pure.

Each function takes what it needs as values and returns problems; reading files and machines is done by callers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeGuard

from disagg.advice.fit_tiers import (
    GIB,
    Demand,
    block_tokens,
    check_memory,
    check_shm,
    kv_bytes_per_token,
    memory_demands,
    shm_demands,
)
from disagg.advice.machine import Machine
from disagg.advice.problems import Problem, shown
from disagg.config import AppConfig
from pools.config import WITHOUT_EFFECT, PoolConfig
from pools.plan.checkpoint import Checkpoint
from pools.plan.engine_kwargs import unknown_engine_kwargs
from pools.plan.launch import merged_engine_kwargs
from pools.plan.placement import parallel_size
from transport.descriptor import Feature
from transport.errors import ConfigError
from transport.transports import describe

ENGINE_PROCESSES_GIB = 2.6
"""API server, EngineCore and one worker of vLLM's CPU build, without weights and KV cache; measured on 0.32."""
EXTRA_RANK_GIB = 0.9
"""What each further worker adds."""

_POSITIVE = ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_gpu_blocks_override")
_LOADED_FROM_FILES = ("auto", "hf", "safetensors", "pt", "npcache", "fastsafetensors", "mistral")
"""Values of `load_format` with which the weights are files of the model's directory."""
_ANY_LENGTH = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
_NOT_SERVED = {"runner": ("pooling", "draft"), "convert": ("embed", "classify")}
"""Values with which a vLLM server has other routes than those of the gateway."""


def pools_of(config: AppConfig) -> dict[str, PoolConfig]:
    """The pools by name."""
    return {"prefill": config.prefill, "decode": config.decode}


def check_engine_kwargs(config: AppConfig, known: Collection[str] | None, prefix: str) -> list[Problem]:
    """Names that vLLM lacks (`known` None: not checked), values that no engine can use, arguments without effect."""
    problems: list[Problem] = []
    places = {"model.engine_kwargs": config.model.engine_kwargs}
    places |= {f"{name}.engine_kwargs": pool.engine_kwargs for name, pool in pools_of(config).items()}
    for where, kwargs in places.items():
        for key, value in kwargs.items():
            path = f"{prefix}.{where}.{key}"
            unknown = unknown_engine_kwargs([key], known) if known is not None else None
            if unknown:
                problems.append(
                    Problem(path, unknown, "arguments of the installed vLLM, with underscores", "rename it")
                )
            elif key in _POSITIVE and value is not None and not _is_count(value):
                problems.append(Problem(path, f"{shown(value)} is not possible", "a whole number from 1", "change it"))
            elif key == "gpu_memory_utilization" and not _is_share(value):
                problems.append(Problem(path, f"{shown(value)} is not possible", "above 0, at most 1", "change it"))
            elif key == "max_model_len" and value == 0:
                allowed = "a whole number from 1, or -1 for what fits into memory"
                problems.append(Problem(path, f"{shown(value)} is not possible", allowed, "change it"))
            elif value in _NOT_SERVED.get(key, ()):
                message = f"{value!r} makes no chat and no completions, and the gateway serves nothing else"
                problems.append(Problem(path, message, "auto", "remove it"))
            elif key in WITHOUT_EFFECT:
                message = f"has no effect: {WITHOUT_EFFECT[key]}"
                problems.append(Problem(path, message, action="remove it", severity="warning"))
        problems += _check_parallel_sizes(kwargs, f"{prefix}.{where}")
    if any(problem.severity == "error" for problem in problems):
        return problems
    return problems + _check_pairs(config, prefix)


def check_model(
    config: AppConfig, checkpoint: Checkpoint, prefix: str, environment: Mapping[str, str]
) -> list[Problem]:
    """The model's own shape against the arguments of either pool, whose engines have these variables."""
    problems: list[Problem] = []
    if not checkpoint.has_tokenizer and "tokenizer" not in config.model.engine_kwargs:
        problems.append(
            Problem(
                f"{prefix}.model.source",
                "the directory has no tokenizer",
                "tokenizer.json or tokenizer.model",
                "add the tokenizer's files, or set model.engine_kwargs.tokenizer",
            )
        )
    if not checkpoint.weight_bytes and config.model.engine_kwargs.get("load_format", "auto") in _LOADED_FROM_FILES:
        problems.append(
            Problem(f"{prefix}.model.source", "the directory has no weights", "*.safetensors", "complete the download")
        )
    length, limit = config.model.engine_kwargs.get("max_model_len"), checkpoint.max_position_embeddings
    # With overrides the model may be made for more, which vLLM itself judges.
    bounded = not config.model.engine_kwargs.get("hf_overrides") and not _allows_any_length(environment)
    if _is_count(length) and limit and length > limit and bounded:
        problems.append(
            Problem(
                f"{prefix}.model.engine_kwargs.max_model_len",
                f"{length} is longer than the model was made for",
                f"at most {limit} (max_position_embeddings)",
                f"lower it, or set the variable {_ANY_LENGTH} to 1 for the engines",
            )
        )
    heads = checkpoint.num_attention_heads
    for name, pool in pools_of(config).items():
        kwargs = merged_engine_kwargs(config.model, pool, config.platform)
        tp = parallel_size(kwargs, "tensor_parallel_size")
        if heads and heads % tp:
            divisors = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            problems.append(
                Problem(
                    place_of(config, name, "tensor_parallel_size", prefix),
                    f"{tp} does not divide the model's {heads} attention heads",
                    divisors,
                    "change it",
                )
            )
        problems += _check_kv_space(config, name, kwargs, checkpoint, prefix)
    return problems


def _allows_any_length(environment: Mapping[str, str]) -> bool:
    """Source: vLLM 0.32 `envs.py`."""
    return environment.get(_ANY_LENGTH, "0").strip().lower() in ("1", "true")


def check_machine(
    config: AppConfig, sizes: Mapping[str, int], machine: Machine, checkpoint: Checkpoint | None, prefix: str
) -> list[Problem]:
    """Cores and memory of one machine against what all replicas take. Only for real engines on `platform: cpu`."""
    problems: list[Problem] = []
    engines_gib, parts = 0.0, []
    for name, pool in pools_of(config).items():
        kwargs = merged_engine_kwargs(config.model, pool, config.platform)
        tp = parallel_size(kwargs, "tensor_parallel_size")
        if tp > 1 and tp * config.cpu.omp_threads > machine.num_cpus:
            problems.append(
                Problem(
                    place_of(config, name, "tensor_parallel_size", prefix),
                    f"{tp} ranks of {config.cpu.omp_threads} threads need {tp * config.cpu.omp_threads} cores, "
                    f"this machine has {machine.num_cpus}",
                    f"at most {max(1, machine.num_cpus // config.cpu.omp_threads)}",
                    "lower it or cpu.omp_threads",
                )
            )
        one = engine_memory_gib(config, tp, checkpoint)
        engines_gib += sizes[name] * one
        parts.append(f"{sizes[name]} {name} x {one:.1f} GiB")
    action = "lower cpu.kv_cache_gib or num_replicas, or use a smaller model"
    engines = Demand(f"{prefix}.cpu.kv_cache_gib", engines_gib, ", ".join(parts), action)
    replicas = {name: sizes[name] for name in pools_of(config)}
    problems += check_memory([engines, *memory_demands(config, replicas, prefix)], machine.memory_bytes)
    problems += check_shm(shm_demands(config, replicas, prefix), machine.shm_bytes, f"{prefix}.platform")
    num_cpus = sum(sizes[name] for name in pools_of(config)) * config.cpu.num_cpus
    num_cpus += sizes["gateway"] * config.gateway_num_cpus
    if num_cpus > machine.num_cpus:
        problems.append(
            Problem(
                f"{prefix}.cpu.num_cpus",
                f"the replicas reserve {num_cpus:g} Ray CPUs, this machine has {machine.num_cpus}, "
                "so Ray would never place some of them",
                action="lower cpu.num_cpus or num_replicas",
            )
        )
    return problems


def engine_memory_gib(config: AppConfig, tensor_parallel_size: int, checkpoint: Checkpoint | None) -> float:
    """Memory of one CPU engine in GiB; without a local checkpoint the weights count as zero."""
    ranks = tensor_parallel_size
    weights = checkpoint.weight_bytes / GIB if checkpoint else 0.0
    return ENGINE_PROCESSES_GIB + EXTRA_RANK_GIB * (ranks - 1) + config.cpu.kv_cache_gib * ranks + weights


def _check_parallel_sizes(kwargs: Mapping[str, Any], path: str) -> list[Problem]:
    problems = []
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        try:
            parallel_size(kwargs, key)
        except ConfigError:
            message = f"{shown(kwargs[key])} is not possible"
            problems.append(Problem(f"{path}.{key}", message, "a whole number from 1", "change it"))
    return problems


def _check_pairs(config: AppConfig, prefix: str) -> list[Problem]:
    problems: list[Problem] = []
    tps = {}
    for name, pool in pools_of(config).items():
        kwargs = merged_engine_kwargs(config.model, pool, config.platform)
        tps[name] = parallel_size(kwargs, "tensor_parallel_size")
        if tps[name] > 1:
            path = place_of(config, name, "tensor_parallel_size", prefix)
            problems += _limit(
                config, "tensor_parallel", path, "compare answers with one engine's before you rely on it"
            )
        if parallel_size(kwargs, "pipeline_parallel_size") > 1:
            feature: Feature = "prefill_pipeline" if name == "prefill" else "decode_pipeline"
            path = place_of(config, name, "pipeline_parallel_size", prefix)
            problems += _limit(config, feature, path, "use tensor_parallel_size")
        tokens, seqs = kwargs.get("max_num_batched_tokens"), kwargs.get("max_num_seqs")
        if tokens is not None and seqs is not None and tokens < seqs:
            problems.append(
                Problem(
                    place_of(config, name, "max_num_batched_tokens", prefix),
                    f"{tokens} is less than max_num_seqs ({seqs})",
                    f"{seqs} or more",
                    "raise it, or lower max_num_seqs",
                )
            )
    low, high = sorted(tps.values())
    if high % low:
        problems.append(
            Problem(
                place_of(config, "decode", "tensor_parallel_size", prefix),
                f"prefill has {tps['prefill']} and decode {tps['decode']}, so their KV blocks do not line up",
                "one a multiple of the other",
                "change one of them",
            )
        )
    block_size = config.model.engine_kwargs.get("block_size")
    if config.platform == "cpu" and block_size is not None and block_size % 32:
        problems.append(
            Problem(
                f"{prefix}.model.engine_kwargs.block_size",
                f"{block_size} is slow on CPU",
                "a multiple of 32",
                "change or remove it",
                severity="warning",
            )
        )
    return problems


def _limit(config: AppConfig, feature: Feature, path: str, action: str) -> list[Problem]:
    """What the transport says of a feature that is used at `path`."""
    limit = describe(config.transport).limits.get(feature)
    if limit is None:
        return []
    severity: Literal["error", "warning"] = "error" if limit.refused else "warning"
    return [Problem(path, limit.message, "1", action, severity=severity)]


def _check_kv_space(
    config: AppConfig, name: str, kwargs: Mapping[str, Any], checkpoint: Checkpoint, prefix: str
) -> list[Problem]:
    length = kwargs.get("max_model_len", checkpoint.max_position_embeddings)
    tokens, key = kv_tokens(config, kwargs, checkpoint)
    if tokens is None or key is None or not _is_count(length) or length <= tokens:
        return []
    path = f"{prefix}.cpu.kv_cache_gib" if key == "kv_cache_gib" else place_of(config, name, key, prefix)
    return [
        Problem(
            path,
            f"a {name} engine has KV space for {tokens} tokens, but max_model_len is {length}",
            f"max_model_len of at most {tokens}",
            f"lower model.engine_kwargs.max_model_len or raise {key}",
        )
    ]


def kv_tokens(
    config: AppConfig, kwargs: Mapping[str, Any], checkpoint: Checkpoint | None
) -> tuple[int | None, str | None]:
    """KV space of one engine in tokens and the setting that fixes it; (None, None) where only vLLM knows."""
    blocks = kwargs.get("num_gpu_blocks_override")
    if _is_count(blocks) and (config.platform == "cpu" or "block_size" in kwargs):
        return blocks * block_tokens(config), "num_gpu_blocks_override"
    per_token = kv_bytes_per_token(kwargs, checkpoint)
    if config.platform != "cpu" or per_token is None:
        return None, None
    return config.cpu.kv_cache_gib * GIB * parallel_size(kwargs, "tensor_parallel_size") // per_token, "kv_cache_gib"


def place_of(config: AppConfig, pool: str, key: str, prefix: str) -> str:
    """The path of an argument of one pool's engines: the pool's own, or the model's."""
    own = pools_of(config)[pool].engine_kwargs
    return f"{prefix}.{pool if key in own else 'model'}.engine_kwargs.{key}"


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
