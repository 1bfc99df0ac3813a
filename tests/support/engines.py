# SPDX-License-Identifier: Apache-2.0
"""One real vLLM engine of a pair, launched as a replica launches it, without Ray."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

from pools.config import CpuConfig, ModelConfig, PoolConfig
from pools.plan.launch import engine_args
from pools.plan.placement import placement
from tests.support.stack import ENGINE_KWARGS, engine_process, free_port, tiny_model
from transport.config import TransportConfig
from transport.launch import EngineFacts, launch

SMALL: dict[str, Any] = {"num_gpu_blocks_override": 1024, "dtype": "float32"}
"""KV space for 131,072 tokens: it is filled with zeros at the start. A CPU without instructions for bfloat16 computes
a prompt eight times as fast in float32."""


def transfer_launch(
    role: Literal["prefill", "decode"],
    transport: TransportConfig,
    *,
    listener_port: int,
    engine_id: str | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """vLLM's arguments for an engine that hands KV over or takes it, and the environment of its transport."""
    facts = EngineFacts(
        role=role,
        platform="cpu",
        host="127.0.0.1",
        listener_port=listener_port,
        engine_id=engine_id or f"{role}-{uuid.uuid4().hex[:8]}",
    )
    plan = launch(transport, facts)
    kwargs = {**ENGINE_KWARGS, **(engine_kwargs or {})}
    arguments = engine_args(
        ModelConfig(id="tiny", source=str(tiny_model()), engine_kwargs=kwargs),
        PoolConfig(),
        platform="cpu",
        kv_transfer_config=plan.kv_transfer_config,
        placement=placement("cpu", kwargs, CpuConfig()),
    )
    return arguments, plan.env


def transfer_engine(
    role: Literal["prefill", "decode"],
    transport: TransportConfig,
    *,
    name: str,
    listener_port: int | None = None,
    engine_id: str | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
) -> AbstractContextManager[str]:
    """URL of such an engine with a small KV space, in a process of its own; its log is `{name}-{role}`.

    A port or an id that is not given is chosen.
    """
    arguments, env = transfer_launch(
        role,
        transport,
        listener_port=listener_port or free_port(),
        engine_id=engine_id,
        engine_kwargs={**SMALL, **(engine_kwargs or {})},
    )
    return engine_process(arguments, env, role=role, name=f"{name}-{role}")
