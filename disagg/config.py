# SPDX-License-Identifier: Apache-2.0
"""The typed form of `args` in a Serve config file: everything that is fixed while an application runs.

Pool sizes are not here. They live in `deployments[].num_replicas`, because a change of `args` restarts every
deployment. Checks that need the machine or other files are in `disagg.check`.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pools.config import CpuConfig, EngineConfig, ModelConfig, Platform, PoolConfig, VllmEngineConfig
from transport.config import (
    Config,
    Name,
    NixlConfig,
    NonNegativeInt,
    PositiveInt,
    Seconds,
    TransportConfig,
    refusal,
)
from transport.tiers import FsL2Config, ManagedServerConfig, OffloadConfig, SharedCacheConfig


class AdminConfig(Config):
    """Who may read and scale the pools over HTTP."""

    key_file: Name | None = None
    """File that holds the admin key, on every node that runs a gateway replica. Without it every /admin request
    is answered 403, so nobody can scale the pools over HTTP."""


class GatewayConfig(Config):
    """The deployment that clients talk to."""

    max_body_bytes: PositiveInt = 10 * 1024 * 1024
    """Largest request body in bytes; a longer one is answered 413. 10 MiB is about two million tokens of text."""
    max_num_requests: PositiveInt = 4096
    """Requests that one gateway replica carries at the same time; more are answered 503 with Retry-After."""
    min_handoff_tokens: NonNegativeInt = 1
    """Prompts shorter than this many tokens are prefilled by the decode engine itself. 1 hands every prompt over."""
    prefill_timeout_s: Seconds = 120.0
    """Seconds that the prefill leg may take in all, retries included. Then the decode engine prefills itself. With
    Mooncake it waits no longer than `transport.kv_lease_duration_s`, and the prefill leg is stopped after it."""
    connect_timeout_s: Seconds = 2.0
    """Seconds to connect to a replica before another one is tried."""
    first_byte_timeout_s: Seconds = 600.0
    """Seconds from sending the decode leg to its first byte. It covers the wait in the engine's queue."""
    idle_timeout_s: Seconds = 120.0
    """Seconds without a byte in a stream that has begun before the decode replica counts as lost."""
    body_timeout_s: Seconds = 60.0
    """Seconds that a client may take to send its request body; then it is answered 408."""
    client_stall_timeout_s: Seconds = 120.0
    """Seconds that a client may take nothing of its stream, with its buffers full, before the stream is ended."""
    retry_after_s: PositiveInt = 5
    """Whole seconds a client is told to wait, in Retry-After, when no replica is ready."""
    ledger_records: PositiveInt = 10_000
    """Consumed hand-offs that one gateway replica remembers for `/admin/v1/handoffs`, and as many others. The totals
    hold for all."""
    num_cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Ray CPUs that one gateway replica reserves. Unset means 1 on cuda and 0.1 on cpu, where cores are few."""
    admin: AdminConfig = AdminConfig()
    """Who may read and scale the pools over HTTP."""


class AppConfig(Config):
    """One application: one model, a prefill pool, a decode pool and a gateway."""

    model: ModelConfig
    """The model that both pools serve."""
    platform: Platform = "cuda"
    """What the engines compute on."""
    engine: EngineConfig = VllmEngineConfig()
    """Which engine the replicas own."""
    cpu: CpuConfig = CpuConfig()
    """What one engine takes of a machine without an accelerator."""
    transport: TransportConfig = NixlConfig()
    """How KV moves from prefill to decode."""
    offload: OffloadConfig | None = None
    """Host memory that keeps KV which falls out of an engine's own memory. Unset means none."""
    shared_cache: SharedCacheConfig | None = None
    """Cache that all replicas share and that outlives them. Unset means none."""
    prefill: PoolConfig = PoolConfig()
    """The prefill pool."""
    decode: PoolConfig = PoolConfig()
    """The decode pool."""
    gateway: GatewayConfig = GatewayConfig()
    """The deployment that clients talk to."""

    @model_validator(mode="after")
    def _cross_fields(self) -> Self:
        if self.platform == "cuda" and self.cpu != CpuConfig():
            raise PydanticCustomError(
                "cpu_settings_on_cuda",
                "cpu settings have no effect with platform: cuda; remove cpu or set platform: cpu",
            )
        for where, kwargs in self._engine_kwargs().items():
            if self.platform == "cpu" and "worker_extension_cls" in kwargs:
                raise PydanticCustomError(
                    "worker_extension_on_cpu",
                    "{where} sets worker_extension_cls, which platform: cpu needs for its own; remove it",
                    {"where": where},
                )
        disk = self.offload.disk.path if self.offload and self.offload.disk else None
        server = self.shared_cache.server if self.shared_cache else None
        for index, l2 in enumerate(server.l2 if isinstance(server, ManagedServerConfig) else ()):
            if isinstance(l2, FsL2Config) and l2.path == disk:
                raise refusal(
                    "same_directory",
                    f"{disk!r} is the directory of offload.disk already",
                    field=f"shared_cache.server.l2[{index}].path",
                    allowed="a directory of its own",
                    action="change one of them",
                )
        self._check_cache_timeout()
        if self.gateway.connect_timeout_s >= self.transport.kv_lease_duration_s:
            raise PydanticCustomError(
                "lease_too_short",
                "transport.kv_lease_duration_s ({lease} s) must exceed gateway.connect_timeout_s ({connect} s), "
                "or KV expires while the gateway tries one dead replica",
                {"lease": self.transport.kv_lease_duration_s, "connect": self.gateway.connect_timeout_s},
            )
        return self

    def _check_cache_timeout(self) -> None:
        """A scheduler blocked by a server that does not answer must not look like an engine that hangs."""
        if self.shared_cache is None:
            return
        limits = {
            "prefill.health_probe_timeout_s": self.prefill.health_probe_timeout_s,
            "decode.health_probe_timeout_s": self.decode.health_probe_timeout_s,
        }
        where, limit = min(limits.items(), key=lambda item: item[1])
        if 2 * self.shared_cache.mq_timeout_s > limit:
            raise refusal(
                "cache_timeout",
                f"a server that does not answer can block an engine's scheduler for {self.shared_cache.mq_timeout_s:g} "
                f"s, twice before it is noticed; a health probe fails after {limit:g} s ({where}), so healthy replicas "
                "would be replaced",
                field="shared_cache.mq_timeout_s",
                allowed=f"{limit / 2:g} or less, half of {where}",
                action=f"lower it, or raise {where}",
            )

    def _engine_kwargs(self) -> dict[str, dict[str, Any]]:
        return {
            "model.engine_kwargs": self.model.engine_kwargs,
            "prefill.engine_kwargs": self.prefill.engine_kwargs,
            "decode.engine_kwargs": self.decode.engine_kwargs,
        }

    @property
    def gateway_num_cpus(self) -> float:
        """Ray CPUs that one gateway replica reserves."""
        if self.gateway.num_cpus is not None:
            return self.gateway.num_cpus
        return 0.1 if self.platform == "cpu" else 1.0
