# SPDX-License-Identifier: Apache-2.0
"""`disagg.app:build`, the `import_path` of a Serve config: from `args` to three bound deployments.

Everything that can be wrong with `args` is said here, before any engine starts. Pool sizes and per-deployment options
come from `deployments:` of the same file and override what is set here.
"""

# No `from __future__ import annotations`: Serve would hand `build` a plain dict either way, and reads annotations.

from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from disagg.advice.check import parse_args, validate_app, validate_machine
from disagg.advice.machine import this_machine
from disagg.advice.paths import resolve
from disagg.config import AppConfig
from disagg.gateway.deployment import GatewayDeployment
from disagg.routing.serve import ReplicaRouter
from pools.config import PoolConfig
from pools.plan.launch import merged_engine_kwargs
from pools.plan.placement import placement
from pools.replica.replica import DecodePool, PrefillPool
from pools.replica.spec import ReplicaSpec
from transport.errors import ConfigError

_SHUTDOWN_MARGIN_S = 30.0
"""What a replica may take after its drain to stop the engine, before Serve kills it."""
_HEALTH_PERIOD_S = 2.0
_HEALTH_TIMEOUT_S = 10.0
"""A replica answers at once what it knows of its engine, so silence means that its process is stopped."""
_GATEWAY_MARGIN_S = 30.0
"""How much longer a gateway may drain than decode replicas, so that it can still tell clients how a stream ended."""


def build(args: dict[str, Any]) -> Application:
    """The application of one config. Raises ConfigError that lists every problem with the path of its field."""
    return build_app(load(args))


def load(args: dict[str, Any]) -> AppConfig:
    """`args` as a checked config with absolute paths. Raises ConfigError."""
    config, problems = parse_args(args)
    if config is not None:
        config = resolve(config, Path.cwd())
        problems = [*problems, *validate_app(config)]
        if ray.is_initialized() and len(ray.nodes()) == 1:
            # The sizes are in `deployments:`, which a builder does not see; one replica of each has to fit.
            problems += validate_machine(config, dict.fromkeys(("gateway", "prefill", "decode"), 1), this_machine())
    errors = [problem for problem in problems if problem.severity == "error"]
    if config is None or errors:
        raise ConfigError("the config cannot work:\n" + "\n".join(f"  {problem}" for problem in errors))
    return config


def build_app(config: AppConfig) -> Application:
    """The deployments `gateway`, `prefill` and `decode`, bound to each other."""
    prefill = _pool(PrefillPool, "prefill", config, config.prefill)
    decode = _pool(DecodePool, "decode", config, config.decode)
    gateway = serve.deployment(
        GatewayDeployment,
        name="gateway",
        ray_actor_options={
            "num_cpus": config.gateway_num_cpus,
            # The proxy's loop and the gateway's are one, so that a stream goes from socket to socket.
            "runtime_env": {
                "env_vars": {
                    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
                    "VLLM_NO_USAGE_STATS": "1",
                    "DO_NOT_TRACK": "1",
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                }
            },
        },
        max_ongoing_requests=config.gateway.max_num_requests + 64,
        graceful_shutdown_timeout_s=config.decode.drain_timeout_s + _GATEWAY_MARGIN_S,
        # A new gateway takes over before the old one leaves. A gateway has no engine, so there is room for both.
        max_surge_percent=100,
        health_check_period_s=_HEALTH_PERIOD_S,
    )
    return gateway.bind(config.model_dump(mode="json"), prefill, decode)


def shutdown_timeout_s(config: AppConfig, pool: PoolConfig) -> float:
    """Seconds after which Serve kills a replica that it stops: drain, a lease in which KV may be read, and margin."""
    return pool.drain_timeout_s + config.transport.kv_lease_duration_s + _SHUTDOWN_MARGIN_S


def _pool(cls: type, name: str, config: AppConfig, pool: PoolConfig) -> Application:
    spec = ReplicaSpec(
        model=config.model,
        platform=config.platform,
        engine=config.engine,
        cpu=config.cpu,
        transport=config.transport,
        offload=config.offload,
        shared_cache=config.shared_cache,
        pool=pool,
        engine_key_file=config.engine_key_file,
    )
    placed = placement(config.platform, merged_engine_kwargs(config.model, pool, config.platform), config.cpu)
    options: dict[str, Any] = {}
    if len(placed.bundles) > 1:
        options["placement_group_bundles"] = [dict(bundle) for bundle in placed.bundles]
        options["placement_group_strategy"] = placed.strategy
    deployment = serve.deployment(
        cls,
        name=name,
        ray_actor_options=dict(placed.actor_options),
        max_ongoing_requests=1_000_000,
        request_router_config=RequestRouterConfig(request_router_class=ReplicaRouter),
        graceful_shutdown_timeout_s=shutdown_timeout_s(config, pool),
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        **options,
    )
    return deployment.bind(spec.model_dump(mode="json"))
