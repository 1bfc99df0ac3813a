# SPDX-License-Identifier: Apache-2.0
"""What a config amounts to: deployments, engine arguments and environment, as they will be used. Pure.

Values that exist only once a replica runs are shown as `<placeholders>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from disagg.config import AppConfig
from pools.plan.launch import engine_args, engine_env, merged_engine_kwargs
from pools.plan.placement import placement
from transport.launch import EngineFacts, launch

HOST, PORT, ENGINE_ID = "<address of the replica's node>", "<free port>", "<new id at every start>"


@dataclass(frozen=True)
class Deployment:
    """One Serve deployment as it will be asked for."""

    name: str
    num_replicas: int | str
    ray_actor_options: dict[str, float]
    placement_group_bundles: tuple[dict[str, float], ...] = ()
    placement_group_strategy: str | None = None
    engine_args: dict[str, Any] | None = None
    """vLLM's arguments; None for the gateway and for fake engines."""
    engine_env: dict[str, str] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return json.loads(json.dumps(self.__dict__, default=str))  # type: ignore[no-any-return]


def deployments(config: AppConfig, entries: Mapping[str, Mapping[str, Any]]) -> tuple[Deployment, ...]:
    """The gateway and both pools.

    Args:
        entries: `deployments[]` of the Serve config by name; what they set wins, as it does in Serve.
    """
    gateway = Deployment("gateway", 1, {"num_cpus": config.gateway_num_cpus})
    pools = (_pool(config, "prefill"), _pool(config, "decode"))
    return tuple(_overridden(deployment, entries.get(deployment.name, {})) for deployment in (gateway, *pools))


def _pool(config: AppConfig, role: Literal["prefill", "decode"]) -> Deployment:
    pool = config.prefill if role == "prefill" else config.decode
    kwargs = merged_engine_kwargs(config.model, pool, config.platform)
    place = placement(config.platform, kwargs, config.cpu)
    args, env = None, None
    if config.engine.type == "vllm":
        facts = EngineFacts(role=role, platform=config.platform, host=HOST, listener_port=0, engine_id=ENGINE_ID)
        engine = launch(config.transport, facts, offload=config.offload, shared_cache=config.shared_cache)
        args = engine_args(
            config.model,
            pool,
            platform=config.platform,
            kv_transfer_config=engine.kv_transfer_config,
            placement=place,
        )
        for child in args["kv_transfer_config"]["kv_connector_extra_config"]["connectors"]:
            extra = child.get("kv_connector_extra_config", {})
            if extra.get("lmcache.mp.port") == 0:
                extra["lmcache.mp.port"] = PORT
        env = {**engine_env(config.platform, config.cpu, host=HOST, engine_kwargs=kwargs), **engine.env}
        env = {key: PORT if key.endswith("_PORT") else value for key, value in env.items()}
    return Deployment(role, 1, place.actor_options, place.bundles, place.strategy, args, env)


def _overridden(deployment: Deployment, entry: Mapping[str, Any]) -> Deployment:
    autoscaling = entry.get("autoscaling_config")
    size: int | str = entry.get("num_replicas") or deployment.num_replicas
    if isinstance(autoscaling, dict):
        size = f"{autoscaling.get('min_replicas', 1)} to {autoscaling.get('max_replicas', 1)}"
    return Deployment(
        name=deployment.name,
        num_replicas=size,
        ray_actor_options={**deployment.ray_actor_options, **(entry.get("ray_actor_options") or {})},
        placement_group_bundles=tuple(entry.get("placement_group_bundles") or deployment.placement_group_bundles),
        placement_group_strategy=entry.get("placement_group_strategy") or deployment.placement_group_strategy,
        engine_args=deployment.engine_args,
        engine_env=deployment.engine_env,
    )


def render(deployment: Deployment) -> str:
    """One deployment as indented text."""
    lines = [f"{deployment.name}: {deployment.num_replicas} replica(s)"]
    lines.append(f"  ray_actor_options: {json.dumps(deployment.ray_actor_options)}")
    if deployment.placement_group_bundles:
        bundles = json.dumps(list(deployment.placement_group_bundles))
        lines.append(f"  placement group: {deployment.placement_group_strategy} {bundles}")
    if deployment.engine_args:
        lines.append("  vLLM arguments:")
        lines += [f"    {key}: {json.dumps(value, default=str)}" for key, value in deployment.engine_args.items()]
    if deployment.engine_env:
        lines.append("  environment:")
        lines += [f"    {key}={value}" for key, value in deployment.engine_env.items()]
    return "\n".join(lines)
