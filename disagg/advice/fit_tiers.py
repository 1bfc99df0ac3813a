# SPDX-License-Identifier: Apache-2.0
"""Whether the tiers of a config can work: against the engines, the model, the packages and the machine. Pure.

A tier's config models check what they can themselves. What only a running LMCache server can tell is checked when a
replica starts.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeGuard

from disagg.advice.fit_layouts import check_layouts
from disagg.advice.machine import Machine
from disagg.advice.problems import Problem
from disagg.config import AppConfig
from pools.plan.checkpoint import Checkpoint
from pools.plan.launch import merged_engine_kwargs
from pools.plan.placement import parallel_size
from transport.lmcache_server import server_problems
from transport.tiers import FsL2Config, ManagedServerConfig, MooncakeStoreL2Config, RespL2Config
from transport.transports import describe

GIB = 1024**3
SERVER_PROCESS_GIB = 0.6
"""One `lmcache server` without its memory; measured on LMCache 0.5.6."""
MESSAGE_QUEUE_GIB = 0.25
"""Free space that vLLM wants in /dev/shm before it makes a message queue of 10 x 24 MiB."""
BLOCK_TOKENS = {"cpu": 128, "cuda": 16}
"""vLLM's KV block where `block_size` is not set."""

SEEDED_AT_RANDOM = ("xxhash", "xxhash_cbor")
"""Algorithms of `prefix_caching_hash_algo` that vLLM seeds with random bytes in each process."""
SEED_VARIABLE = "PYTHONHASHSEED"
"""With it in the environment vLLM seeds all of them with its value."""

_KV_DTYPE_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1}
_DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True)
class Demand:
    """Memory that one part of the application takes of a node."""

    path: str
    """The field that decides it."""
    gib: float
    text: str
    """How it adds up."""
    action: str


def block_tokens(config: AppConfig) -> int:
    """Tokens of the engines' KV block, as far as the arguments say it."""
    given = config.model.engine_kwargs.get("block_size")
    return given if _is_count(given) else BLOCK_TOKENS[config.platform]


def kv_bytes_per_token(kwargs: Mapping[str, Any], checkpoint: Checkpoint | None) -> int | None:
    """Bytes that one token takes over all layers and ranks; None where the model's files do not say it."""
    if checkpoint is None or checkpoint.kv_elements_per_token is None:
        return None
    element = _KV_DTYPE_BYTES.get(str(kwargs.get("kv_cache_dtype", "auto")))
    return checkpoint.kv_elements_per_token * (element or _DTYPE_BYTES.get(str(kwargs.get("dtype")), 2))


def check_packages(config: AppConfig, installed: Callable[[str], bool], prefix: str) -> list[Problem]:
    """Python packages that the transport and the tiers need in every replica."""
    transport = describe(config.transport)
    action = f"install it on every node: pip install 'disagg[{'cpu' if config.platform == 'cpu' else 'gpu'}]'"
    problems = []
    if not installed(transport.module):
        package = transport.packages[config.platform]
        message = f"{transport.name} needs the package {package}, which is not installed here"
        problems.append(Problem(f"{prefix}.transport.type", message, action=action))
    if config.shared_cache is not None and not installed("lmcache"):
        message = "needs the package lmcache, which is not installed here"
        problems.append(Problem(f"{prefix}.shared_cache", message, action=f"{action}, or remove shared_cache"))
    for path, message in _server_problems(config, None, lambda module: module == "lmcache" or installed(module)):
        if path.endswith("type"):
            problems.append(Problem(f"{prefix}.shared_cache.server.{path}", message, action="do so on every node"))
    return problems


def check_tiers(config: AppConfig, environment: Mapping[str, str], prefix: str) -> list[Problem]:
    """Tiers against the engines' arguments, and against each other.

    Args:
        environment: variables of this process; passwords are looked for in it and not read further.
    """
    problems = [*_check_blocks(config, prefix), *_check_directories_apart(config, prefix)]
    named = " and ".join(name for name in ("offload", "shared_cache") if getattr(config, name) is not None)
    kwargs = config.model.engine_kwargs
    if named and kwargs.get("enable_prefix_caching") is False:
        problems.append(
            Problem(
                f"{prefix}.model.engine_kwargs.enable_prefix_caching",
                f"false does not go with {named}: a tier keeps KV for later prompts",
                "true",
                f"remove it, or remove {named}",
            )
        )
    if named and kwargs.get("speculative_config"):
        problems.append(
            Problem(
                f"{prefix}.model.engine_kwargs.speculative_config",
                f"speculative decoding together with {named} is untested",
                action="compare answers with and without the tier before you rely on it",
                severity="warning",
            )
        )
    problems += _check_hashes(config, environment, prefix)
    if config.shared_cache is not None:
        problems += _check_ranks(config, prefix)
    refused = _server_problems(config, None, lambda module: True)
    for path, message in _server_problems(config, environment, lambda module: True):
        # A node may have a variable that this machine lacks; the server looks again where it starts.
        problems.append(
            Problem(
                f"{prefix}.shared_cache.server.{path}",
                message,
                action="export it on every node before Ray starts" if path.endswith("password_env") else "change it",
                severity="error" if (path, message) in refused else "warning",
            )
        )
    return problems


def check_tier_layout(config: AppConfig, checkpoint: Checkpoint, prefix: str) -> list[Problem]:
    """The model's KV layout against the transport and the tiers, and the tiers' sizes against one prompt."""
    return check_layouts(config, checkpoint, prefix) + _check_room(config, checkpoint, prefix)


def memory_demands(config: AppConfig, engines: Mapping[str, int], prefix: str) -> list[Demand]:
    """Host memory of the tiers on one node that runs `engines` replicas of each pool."""
    demands = []
    count = sum(engines.values())
    if config.offload is not None:
        size = config.offload.cpu_gib
        text = f"{count} engines x {size:g} GiB offload"
        action = "lower offload.cpu_gib or num_replicas"
        demands.append(Demand(f"{prefix}.offload.cpu_gib", count * size, text, action))
    server = config.shared_cache.server if config.shared_cache else None
    if isinstance(server, ManagedServerConfig):
        segments = sum(l2.segment_gib for l2 in server.l2 if isinstance(l2, MooncakeStoreL2Config))
        size = server.l1_gib + segments + SERVER_PROCESS_GIB
        path = f"{prefix}.shared_cache.server.l1_gib"
        action = "lower shared_cache.server.l1_gib"
        demands.append(Demand(path, size, f"lmcache server {size:.1f} GiB", action))
    return demands


def shm_demands(config: AppConfig, engines: Mapping[str, int], prefix: str) -> list[Demand]:
    """The part of `memory_demands` that lies in /dev/shm.

    Source:
        vLLM 0.32 `SharedOffloadRegion` (on GPUs, and below a disk tier everywhere), `ShmRingBuffer`. LMCache 0.5.6
        `MixedMemoryAllocator` (where engines copy KV into the server's memory themselves, as on the CPU platform).
    """
    by_path = {demand.path.removeprefix(f"{prefix}."): demand for demand in memory_demands(config, engines, prefix)}
    demands = []
    region = config.offload is not None and (config.platform == "cuda" or config.offload.disk is not None)
    if region:
        demands.append(by_path["offload.cpu_gib"])
    server = config.shared_cache.server if config.shared_cache else None
    if config.platform == "cpu" and isinstance(server, ManagedServerConfig):
        path = f"{prefix}.shared_cache.server.l1_gib"
        text, action = f"lmcache server {server.l1_gib:g} GiB", "lower shared_cache.server.l1_gib"
        demands.append(Demand(path, server.l1_gib, text, action))
    return demands


def check_memory(demands: list[Demand], have_bytes: int) -> list[Problem]:
    """One problem, at the first demand that no longer fits beside those before it; none when all fit."""
    have_gib, total = have_bytes / GIB, sum(demand.gib for demand in demands)
    so_far = 0.0
    for index, demand in enumerate(demands):
        so_far += demand.gib
        if so_far > have_gib:
            parts = ", ".join(part.text for part in demands)
            what = "the engines need" if index == 0 and len(demands) == 1 else "engines and tiers need"
            message = f"{what} {total:.1f} GiB ({parts}), this machine has {have_gib:.1f} GiB"
            return [Problem(demand.path, message, action=demand.action)]
    return []


def check_shm(demands: list[Demand], have_bytes: int | None, path: str) -> list[Problem]:
    """/dev/shm against the tiers in it and vLLM's message queues. `path` is blamed when no tier is in it."""
    if have_bytes is None:
        return []
    have_gib = have_bytes / GIB
    need = MESSAGE_QUEUE_GIB + sum(demand.gib for demand in demands)
    if need <= have_gib:
        return []
    parts = ", ".join([f"vLLM's queues {MESSAGE_QUEUE_GIB} GiB", *(demand.text for demand in demands)])
    lower = f", or {demands[-1].action}" if demands else ""
    return [
        Problem(
            demands[-1].path if demands else path,
            f"needs {need:.2f} GiB of /dev/shm ({parts}), this machine's has {have_gib:.2f} GiB",
            action=f"enlarge it (mount -o remount,size=... /dev/shm; in a container --shm-size or --ipc=host){lower}",
        )
    ]


def check_gpu_node(config: AppConfig, sizes: Mapping[str, int], machine: Machine, prefix: str) -> list[Problem]:
    """Memory of a machine with GPUs against the tiers of as many engines as it can hold."""
    free, engines = machine.num_gpus, {}
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        kwargs = merged_engine_kwargs(config.model, pool, config.platform)
        gpus = parallel_size(kwargs, "tensor_parallel_size") * parallel_size(kwargs, "pipeline_parallel_size")
        engines[name] = min(sizes[name], free // gpus)
        free -= engines[name] * gpus
    if not sum(engines.values()):
        return []
    problems = check_memory(memory_demands(config, engines, prefix), machine.memory_bytes)
    return problems or check_shm(shm_demands(config, engines, prefix), machine.shm_bytes, f"{prefix}.platform")


def check_directories(config: AppConfig, trouble: Callable[[str], str | None], prefix: str) -> list[Problem]:
    """Directories of the tiers, on a machine that runs replicas."""
    return [
        Problem(
            f"{prefix}.{field}",
            f"cannot write below {directory!r}: {reason}",
            "a directory that replicas may write to",
            "change it",
        )
        for field, directory in _directories(config)
        if (reason := trouble(directory))
    ]


def _directories(config: AppConfig) -> list[tuple[str, str]]:
    """Fields that name directories of tiers, and their values."""
    found = []
    if config.offload is not None and config.offload.disk is not None:
        found.append(("offload.disk.path", config.offload.disk.path))
    server = config.shared_cache.server if config.shared_cache else None
    for index, l2 in enumerate(server.l2 if isinstance(server, ManagedServerConfig) else ()):
        if isinstance(l2, FsL2Config):
            found.append((f"shared_cache.server.l2[{index}].path", l2.path))
    return found


def _check_directories_apart(config: AppConfig, prefix: str) -> list[Problem]:
    """A problem for each tier directory that is, holds or lies in another tier's, however the paths are spelled."""
    problems = []
    for (_, first), (field, second) in itertools.combinations(_directories(config), 2):
        a, b = PurePath(os.path.abspath(first)), PurePath(os.path.abspath(second))
        if a.is_relative_to(b) or b.is_relative_to(a):
            how = "the same as" if a == b else "inside" if b.is_relative_to(a) else "around"
            problems.append(
                Problem(
                    f"{prefix}.{field}",
                    f"{str(b)!r} is {how} the directory of another tier, {str(a)!r}",
                    "a directory of its own",
                    "change one of them",
                )
            )
    return problems


def _check_blocks(config: AppConfig, prefix: str) -> list[Problem]:
    block = block_tokens(config)
    given: dict[str, int | None] = {}
    if config.offload is not None:
        given["offload.block_tokens"] = config.offload.block_tokens
    if config.shared_cache is not None:
        given["shared_cache.server.chunk_tokens"] = config.shared_cache.server.chunk_tokens
    source = "" if "block_size" in config.model.engine_kwargs else f", vLLM's default on {config.platform}"
    return [
        Problem(
            f"{prefix}.{field}",
            f"{tokens} is not a multiple of the engines' KV block of {block} tokens{source}",
            f"a multiple of {block}",
            "change it, or set model.engine_kwargs.block_size",
        )
        for field, tokens in given.items()
        if tokens is not None and tokens % block
    ]


def _check_hashes(config: AppConfig, environment: Mapping[str, str], prefix: str) -> list[Problem]:
    """Keys of the disk tier that only the process which wrote them could make again.

    Host memory ends with its process, and LMCache hashes tokens itself (blake3, without a seed).

    Source:
        vLLM 0.32 `v1/core/kv_cache_utils.py`, `resolve_none_hash_seed`; `v1/kv_offload/tiering/fs/manager.py`.
    """
    algorithm = config.model.engine_kwargs.get("prefix_caching_hash_algo")
    if config.offload is None or config.offload.disk is None or SEED_VARIABLE in environment:
        return []
    if algorithm not in SEEDED_AT_RANDOM:
        return []
    return [
        Problem(
            f"{prefix}.model.engine_kwargs.prefix_caching_hash_algo",
            f"{algorithm!r} does not go with offload.disk: every process seeds it at random, so that no engine finds "
            "what another one, or itself before a restart, has stored",
            "sha256, sha256_cbor",
            f"remove it, or set {SEED_VARIABLE} to the same value on every node",
        )
    ]


def _server_problems(
    config: AppConfig, environment: Mapping[str, str] | None, installed: Callable[[str], bool]
) -> list[tuple[str, str]]:
    """Problems of a managed server's settings. Without an environment every variable counts as set."""
    server = config.shared_cache.server if config.shared_cache else None
    if not isinstance(server, ManagedServerConfig):
        return []
    if environment is None:
        environment = {l2.password_env: "" for l2 in server.l2 if isinstance(l2, RespL2Config) and l2.password_env}
    return server_problems(server, environment, installed)


def _check_ranks(config: AppConfig, prefix: str) -> list[Problem]:
    ranks = {}
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        kwargs = merged_engine_kwargs(config.model, pool, config.platform)
        ranks[name] = parallel_size(kwargs, "tensor_parallel_size")
    if ranks["prefill"] == ranks["decode"]:
        return []
    return [
        Problem(
            f"{prefix}.shared_cache",
            f"prefill has tensor_parallel_size {ranks['prefill']} and decode {ranks['decode']}; LMCache's keys hold "
            "the number of ranks, so decode engines never find what prefill engines stored",
            action="set the same size in both pools, or let prefill engines alone profit",
            severity="warning",
        )
    ]


def _check_room(config: AppConfig, checkpoint: Checkpoint, prefix: str) -> list[Problem]:
    kwargs = config.model.engine_kwargs
    per_token = kv_bytes_per_token(merged_engine_kwargs(config.model, config.prefill, config.platform), checkpoint)
    if per_token is None:
        return []
    given = kwargs.get("max_model_len", checkpoint.max_position_embeddings)
    length = given if _is_count(given) else 0
    sizes: dict[str, tuple[float, int]] = {}
    if config.offload is not None:
        piece = config.offload.block_tokens or block_tokens(config)
        sizes["offload.cpu_gib"] = (config.offload.cpu_gib, piece)
    server = config.shared_cache.server if config.shared_cache else None
    if isinstance(server, ManagedServerConfig):
        sizes["shared_cache.server.l1_gib"] = (server.l1_gib, server.chunk_tokens)
    problems = []
    for field, (gib, piece) in sizes.items():
        tokens = int(gib * GIB) // per_token
        too_small = tokens < piece
        if too_small or tokens < length:
            what = f"not one piece of {piece}" if too_small else f"less than one prompt of max_model_len ({length})"
            need = (piece if too_small else length) * per_token / GIB
            problems.append(
                Problem(
                    f"{prefix}.{field}",
                    f"{gib:g} GiB holds {tokens} tokens, {what}",
                    f"{need:.2f} or more",
                    "raise it",
                    severity="error" if too_small else "warning",
                )
            )
    return problems


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
