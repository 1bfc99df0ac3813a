# SPDX-License-Identifier: Apache-2.0
"""The Serve deployments of the two pools: a replica owns one engine and serves it over HTTP on a private port.

Lifecycle only. Requests come over HTTP and never through Serve, so a replica drains by itself when Serve stops it, and
takes its process down when its engine dies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray import serve

from pools.cache_server.actor import NodeCacheServer
from pools.cache_server.probe import check_external
from pools.engine.base import Engine, Role
from pools.errors import EngineStartError
from pools.health.listener_probe import ListenerProbe, listener_probe
from pools.health.watchdog import Watchdog
from pools.plan.launch import ROOT_CAUSE_VARIABLE, merged_engine_kwargs
from pools.plan.placement import parallel_size
from pools.process.descriptors import raise_limit
from pools.process.log_targets import kept_log_targets
from pools.process.ports import free_port
from pools.process.shared_files import SharedFiles
from pools.process.tree import cpu_seconds, kill_descendants
from pools.replica.engine_key import make_key
from pools.replica.kv_digest import kv_fit
from pools.replica.server import EngineServer, OpenRequests
from pools.replica.spec import ReplicaSpec
from pools.replica.start_failure import not_started
from transport.launch import EngineFacts, launch
from transport.tiers import ExternalServerConfig
from transport.transports import describe

logger = logging.getLogger(__name__)

_WATCH_S = 0.2
_EXIT_CODE = 70
_TOLD_S = 5.0
"""How long a replica at its end waits for gateways to read what became of its KV."""


class _Replica:
    """One engine of one pool."""

    role: Role

    async def __init__(self, spec: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._spec = ReplicaSpec.model_validate(spec)
        raise_limit()
        self._shared_files = SharedFiles()
        self._shared_files.start()
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        self._incarnation = uuid.uuid4().hex
        self._host = ray.util.get_node_ip_address()
        self._stopping = False
        self._cache_server: NodeCacheServer | None = None
        self._lmcache_http_url: str | None = None
        self._transport = describe(self._spec.transport)
        started = time.monotonic()
        requests = OpenRequests()
        with self._told_failures():
            self._engine_key = make_key(self._spec.engine_key_file)
            async with self._in_time():
                with kept_log_targets():
                    self._facts = self._make_facts(await self._lmcache_url())
                    self._engine = self._make_engine()
                    await self._engine.start()
                self._watchdog = self._make_watchdog(requests)
                await self._watchdog.first_answer()
                await asyncio.to_thread(self._shared_files.started)
            self._server = EngineServer(
                self._engine,
                role=self.role,
                host=self._host,
                incarnation=self._incarnation,
                health=self._watchdog.health,
                requests=requests,
                key=self._engine_key,
            )
            url = await self._server.start()
        self._watch = asyncio.create_task(self._exit_with_engine())
        self._watchdog.start()
        logger.info(
            "%s replica %s serves %s after %.1f s", self.role, self._replica_id, url, time.monotonic() - started
        )

    @contextmanager
    def _told_failures(self) -> Iterator[None]:
        """Tell in one line why the replica does not come up, if it does not. Raises EngineStartError."""
        with tempfile.TemporaryDirectory(prefix="disagg-start-") as directory:
            notes = Path(directory) / "causes"
            os.environ[ROOT_CAUSE_VARIABLE] = str(notes)
            try:
                yield
            except Exception as exc:
                raise not_started(self.role, self._replica_id, exc, notes) from exc

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Raises EngineStartError after `startup_timeout_s`."""
        limit_s = self._spec.pool.startup_timeout_s
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():  # another one's
                raise
            raise EngineStartError(f"not ready after {limit_s:g} s (startup_timeout_s)") from None

    async def _lmcache_url(self) -> str | None:
        """Wait for the LMCache server to answer, and return its URL; None without a shared tier.

        Raises:
            EngineStartError: no such server answers; the message names the setting.
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

    def _make_facts(self, lmcache_url: str | None) -> EngineFacts:
        kwargs = merged_engine_kwargs(self._spec.model, self._spec.pool, self._spec.platform)
        return EngineFacts(
            role=self.role,
            platform=self._spec.platform,
            host=self._host,
            listener_port=free_port(self._host),
            engine_id=f"{self.role}-{self._replica_id}-{self._incarnation[:8]}",
            tensor_parallel_size=parallel_size(kwargs, "tensor_parallel_size"),
            pipeline_parallel_size=parallel_size(kwargs, "pipeline_parallel_size"),
            lmcache_url=lmcache_url,
        )

    def _make_engine(self) -> Engine:
        spec = self._spec
        plan = launch(spec.transport, self._facts, offload=spec.offload, shared_cache=spec.shared_cache)
        return spec.make_engine(self._facts, plan)

    def _make_watchdog(self, requests: OpenRequests) -> Watchdog:
        on_cpus = self._spec.platform == "cpu" and self._spec.engine.type == "vllm"
        return Watchdog(
            self._engine,
            probe_interval_s=self._spec.pool.probe_interval_s,
            limits=self._spec.hang_limits,
            on_hang=self._exit,
            carrying=lambda: requests.num > 0,
            listener=self._listener_probe(),
            cpu_s=cpu_seconds if on_cpus else None,
        )

    def record_replica_metadata(self) -> dict[str, Any]:
        """What `disagg.routing.serve` hands to every gateway; fields of `ReplicaInfo`. JSON-able."""
        return {
            "pool": self.role,
            "url": self._server.url,
            "engine_id": self._engine.engine_id,
            "incarnation": self._incarnation,
            "block_size": self._engine.block_size,
            "vocab_size": self._engine.vocab_size,
            "kv_source": self._transport.source(self._facts),
            "lmcache_http_url": self._lmcache_http_url,
            "kv_fit": kv_fit(self._spec),
            "secret": self._engine_key,
        }

    def _listener_probe(self) -> ListenerProbe | None:
        """A probe that asks this engine what other engines ask it; None when other engines ask it nothing."""
        listener = self._transport.listener(self._facts)
        return None if listener is None else listener_probe(listener, fake=self._spec.engine.type == "fake")

    async def check_health(self) -> None:
        """Called by Serve; answers at once what the watchdog knows. Raises EngineDeadError.

        When the engine hangs, the watchdog ends this process before Serve would act. Serve would ask three times, and
        then drain a replica that finishes nothing.
        """
        if not self._stopping:
            self._watchdog.check()

    async def _exit_with_engine(self) -> None:
        """End the process with its engine, so that nothing reaches a replica that cannot answer."""
        while (reason := self._engine.dead) is None:
            await asyncio.sleep(_WATCH_S)
        if not self._stopping:
            self._exit(f"its engine is dead: {reason}")

    def _exit(self, why: str) -> NoReturn:
        """Kill the engine's processes, then end this one. A stopped process of the engine would not notice this."""
        killed = kill_descendants()
        logger.error(
            "replica %s exits and has killed %d of its processes, because %s", self._replica_id, len(killed), why
        )
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(_EXIT_CODE)

    async def _wait_for_pulls(self, left_s: float) -> None:
        """Wait while decode engines fetch the KV that this prefill engine holds for them, and the sink stores the rest.

        Each hold ends with its lease, but a busy decode engine renews the lease. So the wait ends after `left_s`, the
        rest of the drain, or after one lease if that is longer.
        """
        deadline = time.monotonic() + max(left_s, self._spec.transport.kv_lease_duration_s)
        while self._engine.dead is None and self._engine.stats().kv_cache_usage > 0 and time.monotonic() < deadline:
            await asyncio.sleep(_WATCH_S)

    async def __del__(self) -> None:
        """Awaited by Serve when it stops the replica, after its routers have dropped it."""
        if getattr(self, "_stopping", True):
            return
        self._stopping = True
        if hasattr(self, "_watch"):
            deadline = time.monotonic() + self._spec.pool.drain_timeout_s
            drained = await self._server.drain(self._spec.pool.drain_timeout_s)
            if not drained:
                logger.warning(
                    "%s requests of %s are cut after %g s of draining",
                    self._server.num_in_flight,
                    self._replica_id,
                    self._spec.pool.drain_timeout_s,
                )
            if self.role == "prefill":
                await self._wait_for_pulls(deadline - time.monotonic())
            if self._engine.dead is None and not await self._server.told(_TOLD_S):
                logger.warning("some gateway has not read the last events of %s", self._replica_id)
            self._watch.cancel()
            self._watchdog.stop()
            await self._server.stop()
        if hasattr(self, "_engine"):
            await self._engine.shutdown()
        self._shared_files.stop()
        # After the end of the engine, because the engine tells the cache server that it leaves.
        if self._cache_server is not None:
            await self._cache_server.stop()


class PrefillPool(_Replica):
    """A replica of the prefill pool."""

    role: Role = "prefill"


class DecodePool(_Replica):
    """A replica of the decode pool."""

    role: Role = "decode"
