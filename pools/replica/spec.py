# SPDX-License-Identifier: Apache-2.0
"""What a replica is built from, and the one place that chooses between the real engine and the fake one."""

from __future__ import annotations

import os

from pools.config import CpuConfig, EngineConfig, FakeEngineConfig, ModelConfig, Platform, PoolConfig
from pools.engine.base import Engine
from pools.health.hang_limits import HangLimits, hang_limits
from pools.plan.launch import engine_args, engine_env, merged_engine_kwargs
from pools.plan.placement import placement
from transport.config import Config, TransportConfig
from transport.facts import EngineFacts, EngineLaunch
from transport.tiers import OffloadConfig, SharedCacheConfig
from transport.transports import describe


class ReplicaSpec(Config):
    """Everything about a replica that is known before it is placed. JSON-able, because Serve compares it."""

    model: ModelConfig
    """The model it serves."""
    platform: Platform
    """What it computes on."""
    engine: EngineConfig
    """Which engine it owns."""
    cpu: CpuConfig
    """Its share of a machine without an accelerator."""
    transport: TransportConfig
    """How its KV moves."""
    offload: OffloadConfig | None = None
    """Host memory below its own KV space."""
    shared_cache: SharedCacheConfig | None = None
    """The tier it shares with the other replicas."""
    pool: PoolConfig
    """The settings of its pool."""
    engine_key_file: str | None = None
    """File with the key of the replica's private HTTP; without a file the replica makes a key."""

    @property
    def hang_limits(self) -> HangLimits:
        return hang_limits(self.pool, self.shared_cache)

    def make_engine(self, facts: EngineFacts, plan: EngineLaunch) -> Engine:
        """An engine that has not been started. Sets the environment that vLLM reads when it is imported."""
        kwargs = merged_engine_kwargs(self.model, self.pool, self.platform)
        if isinstance(self.engine, FakeEngineConfig):
            from pools.engine.fake.engine import FakeEngine
            from pools.engine.fake.tiers import FakeSharedCache

            shared_cache = self.shared_cache
            keeps = shared_cache is not None and shared_cache.sink == "unused"
            return FakeEngine(
                facts.engine_id,
                facts.role,
                self.engine,
                model_id=self.model.id,
                max_model_len=kwargs.get("max_model_len", self.engine.max_model_len),
                host=facts.host,
                listener_port=facts.listener_port,
                kv_lease_duration_s=self.transport.kv_lease_duration_s,
                transport=describe(self.transport),
                shared_cache=FakeSharedCache(shared_cache.server.chunk_tokens) if shared_cache and keeps else None,
            )
        env = engine_env(self.platform, self.cpu, host=facts.host, engine_kwargs=kwargs, given=os.environ)
        os.environ.update(plan.env | env)
        from pools.engine.vllm_engine import VllmEngine

        return VllmEngine(
            engine_args(
                self.model,
                self.pool,
                platform=self.platform,
                kv_transfer_config=plan.kv_transfer_config,
                placement=placement(self.platform, kwargs, self.cpu),
            )
        )
