# SPDX-License-Identifier: Apache-2.0
"""One `lmcache server` a node as a detached Ray actor, and how a replica of the node gets and keeps it.

The first replica of a node makes the actor; ports are arguments of its constructor, so Ray restarts it at the same
address. Replicas renew their use. When no user is left, the actor ends itself: at once when the application is gone or
another server waits for its port, else after a grace time. In that time a new replica still finds what the replica
before it stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pools.cache_server.policy import PROBE_PERIOD_S, RENEW_PERIOD_S, START_TIMEOUT_S, TIMES, Leases, LeaseTimes
from pools.cache_server.renewal import Renewal, State
from pools.cache_server.supervisor import CacheServer, CacheServerAddress
from pools.config import Platform
from pools.errors import EngineStartError
from pools.process.ports import free_port
from transport.config import Config
from transport.lmcache_server import HTTP_HOST
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
    heartbeat_interval_s: float
    """Seconds between two heartbeats of an engine; a restart takes at least two of these."""
    replaces: bool = False
    """Whether engines knew a server at this address, which was lost."""
    times: LeaseTimes = TIMES
    """The agreement with its users."""


class CacheServerActor:
    """Runs the server of one node, as long as somebody uses it."""

    async def __init__(self, spec: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        self._spec = CacheServerSpec.model_validate(spec)
        self._server = CacheServer(
            self._spec.server,
            CacheServerAddress(self._spec.host, self._spec.port, self._spec.http_port),
            platform=self._spec.platform,
            heartbeat_interval_s=self._spec.heartbeat_interval_s,
            replaces=self._spec.replaces or ray.get_runtime_context().was_current_actor_reconstructed,
        )
        self._leases = Leases(idle_since=time.monotonic(), times=self._spec.times)
        self._port_is_wanted = False
        self._failed_at: float | None = None
        self._starting: asyncio.Task[None] | None = None
        # Begun here, so that an actor that no replica ever uses ends as well.
        self._ending = asyncio.create_task(self._end_when_unused())

    async def renew(self, user: str) -> dict[str, Any]:
        """`user` needs the server for the next seconds. Starts the server when this is the actor's first call.

        Returns:
            `CacheServer.status()`.
        """
        self._leases.renew(user, time.monotonic())
        if self._starting is None:
            self._starting = asyncio.create_task(self._server.start())
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

    async def yield_ports(self, ports: Sequence[int]) -> bool:
        """A server with other settings waits for `ports`. If this server has one of them, it ends with its last user.

        Returns:
            Whether this server has one of the ports.
        """
        mine = not {self._spec.port, self._spec.http_port}.isdisjoint(ports)
        self._port_is_wanted = self._port_is_wanted or mine
        return mine

    async def _end_when_unused(self) -> None:
        over = False
        while not over:
            await asyncio.sleep(PROBE_PERIOD_S)
            try:
                over = await self._over()
            except Exception:
                # A watch that ends would leave a server that nobody uses for good.
                logger.exception("cannot tell whether the cache server is used")
        try:
            await self._server.stop()
        except Exception:
            logger.exception("the cache server could not be stopped and is killed")
        # Not `exit_actor`, which works inside a call only.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _over(self) -> bool:
        now = time.monotonic()
        if self._starting is not None and self._starting.done() and self._starting.exception() is not None:
            # The server never ran. The actor stays until its users know why; the next replica tries other ports.
            self._failed_at = self._failed_at or now
            return now - self._failed_at > RENEW_PERIOD_S or self._leases.num_users(now) == 0
        if self._leases.num_users(now):
            return False
        unwanted = self._port_is_wanted or await asyncio.to_thread(_application_gone, self._spec.application)
        return self._leases.over(time.monotonic(), unwanted=unwanted)


class NodeCacheServer:
    """A replica's use of the managed server of its node."""

    def __init__(
        self,
        config: ManagedServerConfig,
        *,
        platform: Platform,
        heartbeat_interval_s: float,
        host: str,
        application: str,
        user: str,
        times: LeaseTimes = TIMES,
    ) -> None:
        """Starts nothing yet; `start` does.

        Args:
            heartbeat_interval_s: that of the engines.
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
            http_port=config.http_port or free_port(HTTP_HOST),
            heartbeat_interval_s=heartbeat_interval_s,
            times=times,
        )
        self._actor: Any = None
        self._renewal: Renewal | None = None

    async def start(self) -> None:
        """Find the node's server, or make one, and wait until it is healthy.

        Raises:
            EngineStartError: it does not become healthy; the message names the setting.
        """
        await self._wait_for_ports()
        try:
            async with asyncio.timeout(START_TIMEOUT_S + _CALL_S):
                while not self.url:
                    await self._join()
            self._renewal = Renewal(self._renew, self._find_again, period_s=self._spec.times.renew_period_s)
            self._renewal.start()
        except TimeoutError:
            await self.stop()
            raise EngineStartError(f"shared_cache.server: not healthy within {START_TIMEOUT_S:g} s") from None
        except RayTaskError as exc:
            await self.stop()
            if isinstance(exc.cause, EngineStartError):
                raise EngineStartError(str(exc.cause)) from None
            raise

    async def _wait_for_ports(self) -> None:
        """Wait until no server of this application with other settings has a port that the config asks for.

        The replicas of such a server have to end first: their engines would take a new server at its address for their
        own.

        Raises:
            EngineStartError: these replicas have not ended in time.
        """
        server, times = self._spec.server, self._spec.times
        fields = {name: port for name in ("port", "http_port") if (port := getattr(server, name)) is not None}
        if not fields:
            return
        named = ", ".join(f"shared_cache.server.{name} ({port})" for name, port in fields.items())
        deadline = time.monotonic() + times.port_wait_s
        waiting = False
        while await asyncio.to_thread(self._held, tuple(fields.values())):
            if time.monotonic() > deadline:
                raise EngineStartError(
                    f"{named}: in use by this application's LMCache server with other settings, whose replicas on this "
                    f"node have not ended within {times.port_wait_s:g} s; leave the ports to the kernel, or delete "
                    "the application before it is deployed with another shared_cache.server"
                )
            if not waiting:
                logger.warning("%s: waits until the replicas with other server settings have ended", named)
            waiting = True
            await asyncio.sleep(PROBE_PERIOD_S)

    def _held(self, ports: Sequence[int]) -> bool:
        """Whether a server of this application and node with other settings has one of `ports`. Blocks."""
        of_this_node = self._name().rpartition(":")[0] + ":"
        for found in ray.util.list_named_actors(all_namespaces=True):
            name = found["name"]
            if found["namespace"] != _NAMESPACE or not name.startswith(of_this_node) or name == self._name():
                continue
            try:
                if _answer(ray.get_actor(name, namespace=_NAMESPACE).yield_ports.remote(ports)):
                    return True
            except (RayError, ValueError, TimeoutError) as exc:
                logger.info("the cache server %s has just ended, or does not answer: %s", name, exc)
        return False

    async def _join(self) -> None:
        """Try once to get the address of a healthy server.

        Leaves the address empty when the actor was lost: it may have been about to end, because it had no users.
        """
        try:
            self._actor = await asyncio.to_thread(self._make)
            await self._actor.renew.remote(self._user)
            address = asyncio.ensure_future(self._actor.address.remote())
            while not (await asyncio.wait([address], timeout=self._spec.times.renew_period_s))[0]:
                await self._actor.renew.remote(self._user)
            self.url, self.http_url = address.result()
        except RayActorError as exc:
            logger.warning("the cache server of this node was lost while it started, and is made again: %s", exc)
            await asyncio.sleep(PROBE_PERIOD_S)

    async def stop(self) -> None:
        """Give up the use of the server, which may end it."""
        if self._renewal is not None:
            await asyncio.to_thread(self._renewal.stop, _CALL_S)
            self._renewal = None
        if self._actor is not None:
            try:
                async with asyncio.timeout(_CALL_S):
                    await self._actor.release.remote(self._user)
            except (RayError, TimeoutError) as exc:
                # The actor is gone already, or this user's lease will run out.
                logger.info("the cache server was not told that %s left: %s", self._user, exc)

    def _name(self) -> str:
        node = ray.get_runtime_context().get_node_id()
        # Each set of settings has its own server: engines of two versions of an application may not share one.
        settings = hashlib.blake2b(self._spec.server.model_dump_json().encode(), digest_size=4).hexdigest()
        return f"cache-server:{self._spec.application}:{node}:{settings}"

    def _make(self) -> Any:
        node = ray.get_runtime_context().get_node_id()
        return (
            ray.remote(CacheServerActor)
            .options(
                name=self._name(),
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

    def _renew(self) -> State:
        """One renewal, in the renewal's thread."""
        try:
            status = _answer(self._actor.renew.remote(self._user))
        except RayActorError:
            return "lost"
        return "healthy" if status["healthy"] else "starting"

    def _find_again(self) -> None:
        """Find the actor if Ray restarts it, or make a new one at the address that engines know."""
        # Without Ray, `remote` of an actor's class would start a cluster.
        if not ray.is_initialized():
            return
        port, http_port = (int(url.rsplit(":", 1)[1]) for url in (self.url, self.http_url))
        self._spec = self._spec.model_copy(update={"port": port, "http_port": http_port, "replaces": True})
        self._actor = self._make()


def _answer(reference: Any) -> Any:
    """The answer of an actor. Blocks its own thread only; `ray.get` would object here all the same.

    Raises:
        TimeoutError: there is none within 10 s.
    """
    return reference.future().result(timeout=_CALL_S)


def _application_gone(application: str) -> bool:
    """Whether Serve has ended, or ends or forgot the application. Blocks. False when Serve cannot be asked."""
    try:
        status = serve.status().applications.get(application)
    except Exception as exc:
        # Serve's controller may be restarting, and raises its own and Ray's errors; the grace decides then.
        logger.info("Serve's state is not known: %s", exc)
        return False
    return status is None or status.status == "DELETING"
