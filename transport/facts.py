# SPDX-License-Identifier: Apache-2.0
"""The values that go into launch planning and come out of it. No logic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["prefill", "decode"]
Platform = Literal["cpu", "cuda"]

KV_ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}
"""vLLM's word for the role of a child that moves KV between the pools."""


@dataclass(frozen=True)
class EngineFacts:
    """What is known about one engine only when its replica starts."""

    role: Role
    platform: Platform
    host: str
    """Address of the replica's node, as other replicas reach it."""
    listener_port: int
    """Free TCP port on which the transport answers other engines, chosen by the kernel."""
    engine_id: str
    """Identity of this engine's KV memory; new with every start."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    lmcache_url: str | None = None
    """`tcp://host:port` of the LMCache server that this engine uses; None without a shared tier."""


@dataclass(frozen=True)
class EngineLaunch:
    """What an engine needs to take part in KV transfer."""

    env: dict[str, str]
    """Environment of the engine's process, to be set before vLLM is imported."""
    kv_transfer_config: dict[str, Any]
    """vLLM's `kv_transfer_config`, JSON-able."""
