# SPDX-License-Identifier: Apache-2.0
"""The gateway as Serve's ingress deployment: feeds it replicas, gives it a way to scale, hands Serve its app.

The one module where the gateway meets Ray. The controller call behind `scale` is not public;
`tests/e2e/test_serve.py` fails when it changes.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from disagg.advice.exposure import ACTION, strangers_served
from disagg.config import AppConfig
from disagg.errors import ConfigError, ConflictError
from disagg.gateway.app import Gateway, create_app
from disagg.gateway.front.render import VllmRenderer
from disagg.gateway.stream import splice
from disagg.routing import feed
from disagg.routing.views import ReplicaInfo
from pools.borrowed import BORROWED
from pools.plan.launch import engine_args, merged_engine_kwargs
from pools.plan.placement import placement
from pools.process.descriptors import raise_limit
from pools.process.log_targets import kept_log_targets
from transport.errors import DisaggError
from transport.transports import describe
from transport.upstream.guard import require

logger = logging.getLogger(__name__)


@serve.ingress()
class GatewayDeployment:
    """One gateway replica."""

    async def __init__(  # type: ignore[misc]  # Serve awaits a coroutine of a constructor
        self, config: Mapping[str, Any], prefill: DeploymentHandle, decode: DeploymentHandle
    ) -> None:
        # A stream takes two descriptors: one of the client's connection, one of the engine's.
        raise_limit()
        require(BORROWED, "disagg.gateway.deployment")
        require(BORROWED, "disagg.routing")
        splice.install()
        self._config = AppConfig.model_validate(config)
        trouble = strangers_served(self._config.gateway, await asyncio.to_thread(serve_host))
        if trouble is not None:
            raise ConfigError(f"the gateway does not start: {trouble}; {ACTION}", path="gateway.api_keys")
        with kept_log_targets():
            self._renderer = await asyncio.to_thread(make_renderer, self._config)
        self._app_name = serve.get_replica_context().app_name
        # Making options is what starts a handle's router, and with it the reports of replicas.
        self._handles = [prefill.options(), decode.options()]

    async def __serve_build_asgi_app__(self) -> Any:
        loop = asyncio.get_running_loop()
        self._gateway = Gateway(
            model_id=self._config.model.id,
            config=self._config.gateway,
            renderer=self._renderer,
            scaler=ServeScaler(self._app_name),
            max_model_len=self._renderer.max_model_len,
            transport=describe(self._config.transport),
            echo_request_id=False,  # Serve's own middleware does
            environment=os.environ,
        )

        def report(pool: str, replicas: list[ReplicaInfo]) -> None:
            loop.call_soon_threadsafe(self._gateway.membership.replace, pool, replicas)

        feed.subscribe(report)
        return create_app(self._gateway)


def make_renderer(config: AppConfig) -> VllmRenderer:
    """vLLM's renderer with the arguments that the decode engines get."""
    placed = placement(config.platform, merged_engine_kwargs(config.model, config.decode, config.platform), config.cpu)
    return VllmRenderer(
        engine_args(config.model, config.decode, platform=config.platform, kv_transfer_config={}, placement=placed)
    )


class ServeScaler:
    """Pool sizes through Serve's controller, in a thread because its calls block."""

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name

    async def targets(self) -> dict[str, int | None]:
        return await asyncio.to_thread(self._targets)

    async def scale(self, pool: str, num_replicas: int) -> None:
        await asyncio.to_thread(self._scale, pool, num_replicas)

    def _targets(self) -> dict[str, int | None]:
        try:
            details = ray.get(_controller().get_serve_instance_details.remote(), timeout=5)
            deployments = details["applications"][self._app_name]["deployments"]
            return {name: deployment["target_num_replicas"] for name, deployment in deployments.items()}
        except (ray.exceptions.RayError, KeyError, ValueError) as exc:
            logger.warning("Serve's controller did not tell the pool sizes: %s", exc)
            return {}

    def _scale(self, pool: str, num_replicas: int) -> None:
        from ray.serve._private.common import DeploymentID
        from ray.serve._private.exceptions import ExternalScalerDisabledError

        target = DeploymentID(name=pool, app_name=self._app_name)
        try:
            ray.get(_controller().update_deployment_replicas.remote(target, num_replicas), timeout=10)
        except ExternalScalerDisabledError as exc:
            raise ConflictError(
                "this application does not allow scaling from outside; set external_scaler_enabled: true on it in the "
                "Serve config and deploy again"
            ) from exc
        except (ray.exceptions.RayError, ValueError) as exc:
            raise DisaggError(f"Serve's controller refused to scale {pool}: {exc}") from exc


def serve_host() -> str | None:
    """Where Serve listens for HTTP; None when it does not. Blocks."""
    location, options = ray.get(
        [_controller().get_proxy_location.remote(), _controller().get_http_config.remote()], timeout=60
    )
    return None if getattr(location, "value", location) == "Disabled" else options.host


def _controller() -> Any:
    return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
