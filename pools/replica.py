# SPDX-License-Identifier: Apache-2.0
"""The Serve deployments of the two pools: a replica owns one engine and serves it over HTTP on a private port.

Lifecycle only. Requests come over HTTP and never through Serve, so a replica drains by itself when Serve stops it, and
takes its process down when its engine dies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any, NoReturn

import ray
from ray import serve

from pools.cache_server_actor import NodeCacheServer
from pools.cache_server_probe import check_external
from pools.engine.base import Engine, Role
from pools.errors import EngineDeadError
from pools.health import HealthProbe
from pools.http import EngineServer
from pools.ports import free_port
from pools.spec import ReplicaSpec
from transport.config import MooncakeConfig
from transport.launch import EngineFacts, launch
from transport.tiers import ExternalServerConfig

logger = logging.getLogger(__name__)

_WATCH_S = 0.2
_EXIT_CODE = 70
_MAX_FAILED_PROBES = 2


class _Replica:
    """One engine of one pool."""

    role: Role

    async def __init__(self, spec: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._spec = ReplicaSpec.model_validate(spec)
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        self._incarnation = uuid.uuid4().hex
        self._host = ray.util.get_node_ip_address()
        self._stopping = False
        self._num_failed_probes = 0
        self._cache_server: NodeCacheServer | None = None
        self._lmcache_http_url: str | None = None
        self._bootstrap_port = free_port(self._host) if isinstance(self._spec.transport, MooncakeConfig) else 0
        started = time.monotonic()
        async with asyncio.timeout(self._spec.pool.startup_timeout_s):
            self._engine = self._make_engine(await self._lmcache_url())
            await self._engine.start()
        self._health = HealthProbe(self._engine, timeout_s=self._spec.pool.health_probe_timeout_s)
        await self._health.check()
        self._server = EngineServer(self._engine, role=self.role, host=self._host, incarnation=self._incarnation)
        url = await self._server.start()
        self._watch = asyncio.create_task(self._exit_with_engine())
        logger.info(
            "%s replica %s serves %s after %.1f s", self.role, self._replica_id, url, time.monotonic() - started
        )

    async def _lmcache_url(self) -> str | None:
        """The URL of an LMCache server that answers, None without a shared tier. An engine does not start without it.

        Raises:
            EngineStartError: there is none; the message names the setting.
        """
        shared_cache = self._spec.shared_cache
        if shared_cache is None or self._spec.engine.type == "fake":
            return None
        if isinstance(shared_cache.server, ExternalServerConfig):
            await check_external(shared_cache.server)
            self._lmcache_http_url = shared_cache.server.http_url
            return shared_cache.server.url
        self._cache_server = NodeCacheServer(
            shared_cache.server,
            platform=self._spec.platform,
            heartbeat_interval_s=shared_cache.heartbeat_interval_s,
            host=self._host,
            application=serve.get_replica_context().app_name,
            user=f"{self._replica_id}-{self._incarnation[:8]}",
        )
        await self._cache_server.start()
        self._lmcache_http_url = self._cache_server.http_url
        return self._cache_server.url

    def _make_engine(self, lmcache_url: str | None) -> Engine:
        facts = EngineFacts(
            role=self.role,
            platform=self._spec.platform,
            host=self._host,
            side_channel_port=free_port(self._host),
            engine_id=f"{self.role}-{self._replica_id}-{self._incarnation[:8]}",
            bootstrap_port=self._bootstrap_port,
            lmcache_url=lmcache_url,
        )
        plan = launch(self._spec.transport, facts, offload=self._spec.offload, shared_cache=self._spec.shared_cache)
        return self._spec.make_engine(facts, plan)

    def record_replica_metadata(self) -> dict[str, Any]:
        """What `disagg.router.serve` hands to every gateway; fields of `ReplicaInfo`. JSON-able."""
        return {
            "pool": self.role,
            "url": self._server.url,
            "engine_id": self._engine.engine_id,
            "incarnation": self._incarnation,
            "block_size": self._engine.block_size,
            "vocab_size": self._engine.vocab_size,
            "bootstrap_url": self._bootstrap_url(),
            "lmcache_http_url": self._lmcache_http_url,
        }

    def _bootstrap_url(self) -> str | None:
        """Where decode engines and gateways ask a prefill engine on Mooncake who it is; None for any other."""
        if self.role != "prefill" or not self._bootstrap_port:
            return None
        return f"http://{self._host}:{self._bootstrap_port}"

    async def check_health(self) -> None:
        """Called by Serve. Raises when the engine does not answer a token of real work in time.

        The second time in a row it ends the process: Serve would wait for a third, and then drain an engine that
        finishes nothing.
        """
        if self._stopping:
            return
        try:
            await self._health.check()
        except EngineDeadError as exc:
            self._num_failed_probes += 1
            if self._num_failed_probes >= _MAX_FAILED_PROBES:
                self._exit(f"it failed {self._num_failed_probes} health probes: {exc}")
            raise
        self._num_failed_probes = 0

    async def _exit_with_engine(self) -> None:
        """End the process with its engine, so that nothing reaches a replica that cannot answer."""
        while (reason := self._engine.dead) is None:
            await asyncio.sleep(_WATCH_S)
        if not self._stopping:
            self._exit(f"its engine is dead: {reason}")

    def _exit(self, why: str) -> NoReturn:
        logger.error("replica %s exits, because %s", self._replica_id, why)
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(_EXIT_CODE)

    async def _wait_for_pulls(self) -> None:
        """Let decode engines fetch what this prefill engine still holds for them, at most for a lease."""
        deadline = time.monotonic() + self._spec.transport.kv_lease_duration_s
        while self._engine.dead is None and self._engine.stats().kv_cache_usage > 0 and time.monotonic() < deadline:
            await asyncio.sleep(_WATCH_S)

    async def __del__(self) -> None:
        """Awaited by Serve when it stops the replica, after its routers have dropped it."""
        if getattr(self, "_stopping", True):
            return
        self._stopping = True
        if hasattr(self, "_server"):
            drained = await self._server.drain(self._spec.pool.drain_timeout_s)
            if not drained:
                logger.warning(
                    "%s requests of %s are cut after %g s of draining",
                    self._server.num_in_flight,
                    self._replica_id,
                    self._spec.pool.drain_timeout_s,
                )
            if self.role == "prefill":
                await self._wait_for_pulls()
            self._watch.cancel()
            await self._server.stop()
        if hasattr(self, "_engine"):
            await self._engine.shutdown()
        # After the engine, which tells the server that it leaves.
        if self._cache_server is not None:
            await self._cache_server.stop()


class PrefillPool(_Replica):
    """A replica of the prefill pool."""

    role: Role = "prefill"


class DecodePool(_Replica):
    """A replica of the decode pool."""

    role: Role = "decode"
