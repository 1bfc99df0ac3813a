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
from disagg.gateway.serve_plan import PoolPlan, plan_of
from disagg.gateway.stream import splice
from disagg.routing import feed
from disagg.routing.views import ReplicaInfo
from pools.borrowed import BORROWED
from pools.config import RESERVED_ENGINE_KWARGS
from pools.plan.engine_kwargs import known_engine_kwargs
from pools.plan.launch import engine_args, merged_engine_kwargs
from pools.plan.placement import placement
from pools.process.descriptors import raise_limit
from pools.process.log_targets import kept_log_targets
from pools.replica.serve_details import controller, details, end, without_place
from pools.replica.start_failure import not_started
from transport.errors import DisaggError
from transport.transports import describe
from transport.upstream.guard import require

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
_LOOKS = 60
"""Serve takes some of its own rounds to mark replicas that are to go, the more the more there are."""


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
        context = serve.get_replica_context()
        try:
            with kept_log_targets():
                self._renderer = await asyncio.to_thread(make_renderer, self._config)
        except Exception as exc:
            raise not_started("gateway", context.replica_id.unique_id, exc) from exc
        self._engine_arguments = await asyncio.to_thread(settable_arguments)
        self._app_name = context.app_name
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
            engine_arguments=self._engine_arguments,
        )

        def report(pool: str, replicas: list[ReplicaInfo]) -> None:
            loop.call_soon_threadsafe(self._gateway.membership.replace, pool, replicas)

        feed.subscribe(report)
        return create_app(self._gateway)


def settable_arguments() -> frozenset[str]:
    """The engine arguments that a config may set; none where vLLM is not installed. Reads files."""
    return (known_engine_kwargs() or frozenset()) - RESERVED_ENGINE_KWARGS.keys()


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
        self._ending: asyncio.Task[None] | None = None
        self._looks_left = 0

    async def plans(self) -> dict[str, PoolPlan]:
        return await asyncio.to_thread(self._plans)

    async def scale(self, pool: str, num_replicas: int) -> None:
        await asyncio.to_thread(self._scale, pool, num_replicas)
        self._looks_left = _LOOKS
        if self._ending is None or self._ending.done():
            self._ending = asyncio.create_task(self._end_unplaced())

    async def _end_unplaced(self) -> None:
        """Look for a while after a change of size for replicas that stop before they ever had a place."""
        while self._looks_left > 0:
            self._looks_left -= 1
            await asyncio.sleep(_LOOK_S)
            try:
                await asyncio.to_thread(lambda: end(without_place(details(self._app_name), stopping=True)))
            except (ray.exceptions.RayError, KeyError, ValueError) as exc:
                logger.warning("replicas without a place are left to Serve: %s", exc)
                return

    def _plans(self) -> dict[str, PoolPlan]:
        try:
            free = ray.available_resources()
            return {name: plan_of(deployment, free) for name, deployment in details(self._app_name).items()}
        except (ray.exceptions.RayError, KeyError, ValueError) as exc:
            logger.warning("Serve's controller did not tell what it plans: %s", exc)
            return {}

    def _scale(self, pool: str, num_replicas: int) -> None:
        from ray.serve._private.common import DeploymentID
        from ray.serve._private.exceptions import ExternalScalerDisabledError

        target = DeploymentID(name=pool, app_name=self._app_name)
        try:
            ray.get(controller().update_deployment_replicas.remote(target, num_replicas), timeout=10)
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
        [controller().get_proxy_location.remote(), controller().get_http_config.remote()], timeout=60
    )
    return None if getattr(location, "value", location) == "Disabled" else options.host
