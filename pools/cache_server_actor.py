# SPDX-License-Identifier: Apache-2.0
"""One `lmcache server` a node as a detached Ray actor, and how a replica of the node gets and keeps it.

The first replica of a node makes the actor; ports are arguments of its constructor, so Ray restarts it at the same
address. Replicas renew their use, and the actor ends itself when none is left: at once when the application is gone,
else after a grace in which a replaced replica finds what its predecessor stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pools.cache_server import CacheServer, CacheServerAddress
from pools.cache_server_policy import PROBE_PERIOD_S, RENEW_PERIOD_S, START_TIMEOUT_S, Leases
from pools.config import Platform
from pools.errors import EngineStartError
from pools.ports import free_port
from transport.config import Config
from transport.tiers import ManagedServerConfig

logger = logging.getLogger(__name__)

_NAMESPACE = "disagg"
_CALL_S = 10.0


class CacheServerSpec(Config):
    """What an actor is built from. JSON-able."""

    application: str
    """Serve application whose replicas use the server."""
    platform: Platform
    """What the engines compute on."""
    server: ManagedServerConfig
    """Settings of the server."""
    host: str
    """Private address of the node."""
    port: int
    """Port of the message queue."""
    http_port: int
    """Port of the HTTP API."""


class CacheServerActor:
    """Runs the server of one node, as long as somebody uses it."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = CacheServerSpec.model_validate(spec)
        address = CacheServerAddress(self._spec.host, self._spec.port, self._spec.http_port)
        self._server = CacheServer(self._spec.server, address, platform=self._spec.platform)
        self._leases = Leases(idle_since=time.monotonic())
        self._starting: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    async def renew(self, user: str) -> dict[str, Any]:
        """`user` needs the server for the next seconds. Starts the server when this is the actor's first call.

        Returns:
            `CacheServer.status()`.
        """
        self._leases.renew(user, time.monotonic())
        if self._starting is None:
            self._starting = asyncio.create_task(self._server.start())
            self._ending = asyncio.create_task(self._end_when_unused())
        return self._server.status()

    async def address(self) -> tuple[str, str]:
        """URLs of message queue and HTTP API, once the server is healthy. EngineStartError if it cannot start."""
        assert self._starting is not None, "renew() comes first"
        await asyncio.shield(self._starting)
        await self._server.wait_healthy()
        return self._server.address.url, self._server.address.http_url

    async def release(self, user: str) -> None:
        """`user` does not need the server any more."""
        self._leases.release(user, time.monotonic())

    async def _end_when_unused(self) -> None:
        while not await self._over():
            await asyncio.sleep(PROBE_PERIOD_S)
        await self._server.stop()
        # Not `exit_actor`, which works inside a call only.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _over(self) -> bool:
        assert self._starting is not None
        now = time.monotonic()
        if self._starting.done() and self._starting.exception() is not None:
            # A server that never ran; the next replica tries with other ports.
            return now - self._leases.idle_since > RENEW_PERIOD_S or self._leases.num_users(now) == 0
        if self._leases.num_users(now):
            return False
        gone = await asyncio.to_thread(_application_gone, self._spec.application)
        return self._leases.over(time.monotonic(), application_gone=gone)


class NodeCacheServer:
    """A replica's use of the managed server of its node."""

    def __init__(self, config: ManagedServerConfig, *, platform: Platform, host: str, application: str, user: str):
        """Decides nothing yet; `start` does.

        Args:
            host: private address of the node.
            application: the replica's Serve application.
            user: identity of the replica, new with every start.
        """
        self.url = self.http_url = ""
        self._user = user
        self._spec = CacheServerSpec(
            application=application,
            platform=platform,
            server=config,
            host=host,
            port=config.port or free_port(host),
            http_port=config.http_port or free_port(host),
        )
        self._actor: Any = None
        self._renewing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Find the node's server, or make one, and wait until it is healthy.

        Raises:
            EngineStartError: it does not become healthy; the message names the setting.
        """
        try:
            async with asyncio.timeout(START_TIMEOUT_S + _CALL_S):
                while not self.url:
                    await self._join()
            self._renewing = asyncio.create_task(self._renew())
        except TimeoutError:
            await self.stop()
            raise EngineStartError(f"shared_cache.server: not healthy within {START_TIMEOUT_S:g} s") from None
        except RayTaskError as exc:
            await self.stop()
            if isinstance(exc.cause, EngineStartError):
                raise EngineStartError(str(exc.cause)) from None
            raise

    async def _join(self) -> None:
        """One try to get the address of a server that is healthy. Without one when the actor was lost, as an actor is
        that was just about to end for want of users."""
        try:
            self._actor = await asyncio.to_thread(self._make)
            await self._actor.renew.remote(self._user)
            address = asyncio.ensure_future(self._actor.address.remote())
            while not (await asyncio.wait([address], timeout=RENEW_PERIOD_S))[0]:
                await self._actor.renew.remote(self._user)
            self.url, self.http_url = address.result()
        except RayActorError as exc:
            logger.warning("the cache server of this node was lost while it started, and is made again: %s", exc)
            await asyncio.sleep(PROBE_PERIOD_S)

    async def stop(self) -> None:
        """Give up the use of the server, which may end it."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
            self._renewing = None
        if self._actor is not None:
            try:
                async with asyncio.timeout(_CALL_S):
                    await self._actor.release.remote(self._user)
            except (RayError, TimeoutError) as exc:
                # It is gone already, or its lease will run out.
                logger.info("the cache server was not told that %s left: %s", self._user, exc)

    def _make(self) -> Any:
        node = ray.get_runtime_context().get_node_id()
        # Other settings are another server: engines of two versions of an application may not share one.
        settings = hashlib.blake2b(self._spec.server.model_dump_json().encode(), digest_size=4).hexdigest()
        return (
            ray.remote(CacheServerActor)
            .options(
                name=f"cache-server:{self._spec.application}:{node}:{settings}",
                namespace=_NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                num_cpus=0,
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(self._spec.model_dump(mode="json"))
        )

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_PERIOD_S)
            try:
                async with asyncio.timeout(_CALL_S):
                    await self._actor.renew.remote(self._user)
            except RayActorError:
                await self._find_again()
            except (RayError, TimeoutError) as exc:
                logger.warning("the cache server of this node does not answer: %s", exc)

    async def _find_again(self) -> None:
        """The actor is being restarted, or it is gone for good and is made anew at the address engines know."""
        if self.url:
            port, http_port = (int(url.rsplit(":", 1)[1]) for url in (self.url, self.http_url))
            self._spec = self._spec.model_copy(update={"port": port, "http_port": http_port})
        try:
            self._actor = await asyncio.to_thread(self._make)
        except (RayError, ValueError) as exc:
            logger.warning("the cache server of this node cannot be made again yet: %s", exc)


def _application_gone(application: str) -> bool:
    """Whether Serve has ended, or ends or forgot the application. Blocks. False when Serve cannot be asked."""
    try:
        status = serve.status().applications.get(application)
    except Exception as exc:
        # Serve's controller may be restarting, and raises its own and Ray's errors; the grace decides then.
        logger.info("Serve's state is not known: %s", exc)
        return False
    return status is None or status.status == "DELETING"
