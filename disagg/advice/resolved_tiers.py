# SPDX-License-Identifier: Apache-2.0
"""What the tiers of a config amount to: sizes on a node and in all, tokens, and the command of the server. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from disagg.advice.fit_tiers import GIB, kv_bytes_per_token
from disagg.advice.resolved import HOST, PORT
from disagg.config import AppConfig
from pools.plan.checkpoint import Checkpoint
from pools.plan.launch import merged_engine_kwargs
from transport.lmcache_server import server_argv
from transport.tiers import ExternalServerConfig, OffloadConfig, SharedCacheConfig


@dataclass(frozen=True)
class Tier:
    """One place where KV is kept beside the engines' own memory."""

    name: str
    """Its setting, as `offload`."""
    summary: str
    gib_each: float | None
    """GiB of one engine or one server; None where this application does not decide it."""
    gib_total: float | None
    """GiB over all engines; None where it depends on the number of nodes."""
    tokens_each: int | None
    """Tokens that one holds; None where only the engine knows the size of a token."""
    details: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    """The command that starts the server, with placeholders for what is chosen at the start."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def tiers(config: AppConfig, sizes: Mapping[str, int], checkpoint: Checkpoint | None) -> tuple[Tier, ...]:
    """The tiers in the order in which an engine asks them.

    Args:
        sizes: number of replicas of `prefill` and `decode`.
    """
    kwargs = merged_engine_kwargs(config.model, config.prefill, config.platform)
    per_token = kv_bytes_per_token(kwargs, checkpoint)
    found = []
    if config.offload is not None:
        found.append(_offload(config.offload, sizes, per_token))
    if config.shared_cache is not None:
        found.append(_shared(config.shared_cache, config.platform, per_token))
    return tuple(found)


def render_tier(tier: Tier) -> str:
    """One tier as indented text."""
    lines = [f"{tier.name}: {tier.summary}", *(f"  {detail}" for detail in tier.details)]
    if tier.command:
        words = (word if word in (HOST, PORT) else shlex.quote(word) for word in tier.command)
        lines.append(f"  command: {' '.join(words)}")
    return "\n".join(lines)


def _offload(offload: OffloadConfig, sizes: Mapping[str, int], per_token: int | None) -> Tier:
    count = sizes["prefill"] + sizes["decode"]
    tokens = int(offload.cpu_gib * GIB) // per_token if per_token else None
    total = count * offload.cpu_gib
    summary = f"{offload.cpu_gib:g} GiB of host memory an engine, all ranks together; {count} engines, {total:g} GiB"
    details = [f"{tokens} tokens an engine"] if tokens is not None else []
    if offload.disk is not None:
        details.append(f"disk: {offload.disk.path}")
    return Tier("offload", summary, offload.cpu_gib, total, tokens, tuple(details))


def _shared(cache: SharedCacheConfig, platform: str, per_token: int | None) -> Tier:
    server = cache.server
    details = [f"sink: {cache.sink}", f"chunks of {server.chunk_tokens} tokens"]
    if isinstance(server, ExternalServerConfig):
        return Tier("shared_cache", f"the LMCache server at {server.url}", None, None, None, tuple(details))
    tokens = int(server.l1_gib * GIB) // per_token if per_token else None
    if tokens is not None:
        details.append(f"{tokens} tokens a server")
    details += [f"L2 {index}: {_l2(l2)}" for index, l2 in enumerate(server.l2)]
    summary = f"one lmcache server a node with pool replicas, {server.l1_gib:g} GiB of host memory each"
    argv = server_argv(
        server,
        platform=platform,
        host=HOST,
        port=server.port or 0,
        http_port=server.http_port or 0,
        shm_name="new-at-every-start",
    )
    ports = [index + 1 for index, value in enumerate(argv[:-1]) if value in ("--port", "--http-port")]
    command = [PORT if index in ports and value == "0" else value for index, value in enumerate(argv)]
    return Tier("shared_cache", summary, server.l1_gib, None, tokens, tuple(details), ("lmcache", "server", *command))


def _l2(l2: Any) -> str:
    fields = l2.model_dump(exclude={"type"}, exclude_none=True)
    return " ".join([l2.type, *(f"{key}={value}" for key, value in fields.items() if value != "")])
