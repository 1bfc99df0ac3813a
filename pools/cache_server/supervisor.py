# SPDX-License-Identifier: Apache-2.0
"""Runs one `lmcache server` as a child process: starts it, probes it, restarts it at the same address, ends it.

Knows no Ray; `pools.cache_server.actor` runs it as an actor of each node. What to do is decided in
`pools.cache_server.policy`.
"""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pools.cache_server import child as cache_server_child
from pools.cache_server.policy import PROBE_PERIOD_S, PROBE_TIMEOUT_S, Life, restart_pause_s, why_it_ended
from pools.cache_server.probe import http_get, is_well
from pools.errors import EngineStartError
from transport.lmcache_server import HTTP_HOST, new_shm_name, server_argv, server_env, server_problems, shm_stem
from transport.tiers import ManagedServerConfig

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_STOP_S = 8.0
_QUEUE_ENDED = "Exception in thread mq-server-thread"
"""What Python writes when LMCache's queue thread ends with an exception: the server answers nothing from then on."""
_PROGRAM = "pools.cache_server.main"
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class CacheServerAddress:
    """Where one node's server is; it stays there through all restarts."""

    host: str
    """Private address of the node."""
    port: int
    """Port of the message queue."""
    http_port: int
    """Port of health, status and metrics, on loopback."""

    @property
    def url(self) -> str:
        """What engines connect to."""
        return f"tcp://{self.host}:{self.port}"

    @property
    def http_url(self) -> str:
        """Base URL of the HTTP API. Only for the node's processes: it asks for no key and shows the environment."""
        return f"http://{HTTP_HOST}:{self.http_port}"


class CacheServer:
    """One supervised server. Use it from one event loop, whose thread must live as long as the server should."""

    def __init__(
        self,
        config: ManagedServerConfig,
        address: CacheServerAddress,
        *,
        platform: str,
        heartbeat_interval_s: float,
        replaces: bool = False,
        shared_memory: Path = _SHARED_MEMORY,
    ) -> None:
        """Starts nothing yet.

        Args:
            heartbeat_interval_s: seconds between two heartbeats of an engine; a restart takes at least two of these.
            replaces: a server at this address has just ended, so the first start is a restart to engines.
        """
        self.address = address
        self._config = config
        self._platform = platform
        self._shared_memory = shared_memory
        self._life = Life(pause_s=restart_pause_s(heartbeat_interval_s))
        self._replaces = replaces
        self._process: subprocess.Popen[str] | None = None
        self._output: deque[str] = deque()
        self._reader: threading.Thread | None = None
        self._queue_ended: subprocess.Popen[str] | None = None
        self._last_end = "it was stopped"
        self._healthy = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the server and wait until it is healthy. From then on it is restarted whenever it dies or hangs.

        Raises:
            EngineStartError: it cannot start with these settings, died, or was not healthy in time.
        """
        problems = server_problems(self._config, os.environ, has_module)
        if problems:
            raise EngineStartError("; ".join(f"shared_cache.server.{path}: {text}" for path, text in problems))
        self._make_directories()
        if self._replaces:
            await asyncio.sleep(self._life.pause_s)
        try:
            self._spawn()
        except OSError as exc:
            raise EngineStartError(f"shared_cache.server: LMCache cannot be started: {exc}") from exc
        self._watch = asyncio.create_task(self._supervise())
        while not self._healthy.is_set():
            if self._life.num_restarts:
                await self.stop()
                raise EngineStartError(f"shared_cache.server: LMCache did not come up: {self._last_end}")
            await asyncio.sleep(_POLL_S)

    async def wait_healthy(self) -> None:
        """Returns when the server answers, now or after its restart."""
        await self._healthy.wait()

    def status(self) -> dict[str, Any]:
        """Pid (None while none runs), whether it answers, and how often it was restarted. JSON-able."""
        return {
            "pid": self._process.pid if self._process is not None else None,
            "healthy": self._healthy.is_set(),
            "num_restarts": self._life.num_restarts,
        }

    async def stop(self) -> None:
        """End the server for good and remove its shared memory. Safe to call twice."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
        self._healthy.clear()
        if self._process is not None:
            self._process.terminate()
            if not await self._ended(_STOP_S):
                self._process.kill()
                await self._ended(_STOP_S)
            self._process = None
        self._remove_shared()

    def _spawn(self) -> None:
        self._remove_shared()
        argv = server_argv(
            self._config,
            platform=self._platform,
            host=self.address.host,
            port=self.address.port,
            http_port=self.address.http_port,
            shm_name=new_shm_name(self.address.port, uuid.uuid4().hex[:8]),
        )
        # Never in a helper thread: the kernel ends the server together with the thread that started it.
        self._output = deque(maxlen=60)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", cache_server_child.__file__, str(os.getpid())),
                *(sys.executable, "-m", _PROGRAM, "server", *argv),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **server_env(self._config, os.environ)},
        )
        self._reader = threading.Thread(target=self._read, args=(self._process, self._output), daemon=True)
        self._reader.start()
        self._life.started(time.monotonic())

    def _make_directories(self) -> None:
        for index, l2 in enumerate(self._config.l2):
            if l2.type == "fs":
                try:
                    Path(l2.path).mkdir(parents=True, exist_ok=True)
                except OSError as exc:
                    path = f"shared_cache.server.l2[{index}].path"
                    raise EngineStartError(f"{path}: {l2.path} cannot be made: {exc.strerror or exc}") from exc

    def _read(self, process: subprocess.Popen[str], output: deque[str]) -> None:
        """Keep the server's last lines for an error message, and log its warnings and errors."""
        assert process.stderr is not None
        for line in process.stderr:
            output.append(line.rstrip())
            if line.startswith(_QUEUE_ENDED):
                self._queue_ended = process
            loud = "LMCache WARNING" in line or "LMCache ERROR" in line
            logger.log(logging.WARNING if loud else logging.DEBUG, "lmcache server: %s", line.rstrip())

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S if self._life.healthy_at is None else PROBE_PERIOD_S)
            try:
                await self._look()
            except Exception:
                # A supervisor that ends would leave its server to its fate.
                logger.exception("cannot look after the LMCache server at %s", self.address.url)
                await asyncio.sleep(PROBE_PERIOD_S)

    async def _look(self) -> None:
        if self._life.started_at is not None:
            await self._probe()
        step = self._life.step(time.monotonic())
        if step == "start":
            self._start_again()
        elif step == "kill":
            assert self._process is not None
            self._process.kill()
            await self._ended(_STOP_S)
            self._died("it did not answer and was killed")

    def _start_again(self) -> None:
        """Try once to start the server. A failure counts as an early death, so the next try waits as long."""
        try:
            self._make_directories()
            self._spawn()
        except (EngineStartError, OSError) as exc:
            logger.error("the LMCache server at %s cannot be started: %s", self.address.url, exc)
            self._last_end = str(exc)
            self._life.died(time.monotonic())

    async def _probe(self) -> None:
        """Ask the server, and notice at once when its process ends meanwhile."""
        assert self._process is not None
        probe = asyncio.ensure_future(self._answers())
        try:
            while not probe.done() and self._process.poll() is None and self._queue_ended is not self._process:
                await asyncio.wait([probe], timeout=_POLL_S)
        finally:
            probe.cancel()
        if self._process.poll() is not None:
            if self._reader is not None:
                await asyncio.to_thread(self._reader.join, 1.0)
            self._died(why_it_ended(self._output))
            return
        if self._queue_ended is self._process:
            self._life.silenced()
            return
        was_healthy = self._life.healthy_at is not None
        self._life.probed(probe.result(), time.monotonic())
        if self._life.healthy_at is not None and not was_healthy:
            self._healthy.set()
            logger.info("LMCache server %d answers at %s", self._process.pid, self.address.url)

    async def _answers(self) -> bool:
        answered = await is_well(self.address.url, chunk_tokens=self._config.chunk_tokens, timeout_s=PROBE_TIMEOUT_S)
        if not answered or self._life.healthy_at is not None:
            return answered
        try:
            status, _ = await http_get(f"{self.address.http_url}/healthcheck", timeout_s=PROBE_TIMEOUT_S)
        except (OSError, http.client.HTTPException):
            return False
        return status == 200

    def _died(self, why: str) -> None:
        assert self._process is not None
        logger.error("LMCache server %d at %s ended: %s", self._process.pid, self.address.url, why)
        self._last_end = why
        self._healthy.clear()
        self._process = None
        self._life.died(time.monotonic())
        self._remove_shared()

    async def _ended(self, timeout_s: float) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _remove_shared(self) -> None:
        for file in self._shared_memory.glob(f"{shm_stem(self.address.port)}*"):
            file.unlink(missing_ok=True)


def has_module(name: str) -> bool:
    """Whether a module is installed. Nothing is imported: `find_spec` of a submodule would import its package."""
    package, _, module = name.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not module:
        return spec is not None
    return any(list(Path(place).glob(f"{module}*")) for place in spec.submodule_search_locations or ())
