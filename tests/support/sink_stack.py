# SPDX-License-Identifier: Apache-2.0
"""A real `lmcache server` that a test may kill and start again, and engines that use it. Linux, no accelerator."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pools.config import CpuConfig, ModelConfig, PoolConfig
from pools.plan.launch import engine_args
from pools.plan.placement import placement
from tests.support.engines import SMALL
from tests.support.stack import BUILD, ENGINE_KWARGS, engine_process, free_port, note_start, tiny_model, wait_until
from transport.config import NixlConfig
from transport.handoff_params import offer_params
from transport.launch import EngineFacts, launch
from transport.lmcache_server import new_shm_name, server_argv, server_env, shm_stem
from transport.tiers import ManagedServerConfig, SharedCacheConfig, Sink

CHUNK = 256
"""Tokens of an LMCache chunk: two KV blocks of the CPU engine."""
TOKEN_BYTES = 4 * 2 * 2 * 64 * 4
"""KV of a token of the tiny model: layers, K and V, heads, head size, float32."""


@dataclass
class Server:
    """One `lmcache server` at a fixed address, started and killed as the test says."""

    port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it answers."""
        note_start("LMCache server")
        config = ManagedServerConfig(l1_gib=0.5, chunk_tokens=CHUNK)
        argv = server_argv(
            config,
            platform="cpu",
            host="127.0.0.1",
            port=self.port,
            http_port=self.http_port,
            shm_name=new_shm_name(self.port, uuid.uuid4().hex[:8]),
        )
        BUILD.mkdir(exist_ok=True)
        with (BUILD / "lmcache-sink.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lmcache.cli.main", "server", *argv],
                env={**os.environ, **server_env(config, os.environ)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_until(self._answers, 120, "lmcache server answers", 0.25)

    def kill(self) -> None:
        """SIGKILL: nothing is cleaned up, as after a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
        for segment in Path("/dev/shm").glob(f"{shm_stem(self.port)}*"):
            segment.unlink(missing_ok=True)

    def freeze(self, frozen: bool) -> None:
        """Stop it where it is, or let it go on: alive for the kernel, silent for its engines."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def stored_bytes(self) -> int:
        """Bytes of KV in its memory."""
        status = httpx.get(f"http://127.0.0.1:{self.http_port}/status", timeout=10).json()
        return int(status["storage_manager"]["l1_manager"]["memory_used_bytes"])

    def forget_engines(self) -> None:
        """Make it know no engine any more, as one does that was back before anybody missed it."""
        import zmq
        from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

        status = httpx.get(f"http://127.0.0.1:{self.http_port}/status", timeout=10).json()
        client = RequestClientFactory.create(self.url, context=zmq.Context.instance())
        try:
            for instance in status["registered_non_cuda_instance_ids"]:
                client.unregister_kv_cache_engine_driven_context(instance).result(timeout=10)
        finally:
            client.close()

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError("lmcache server ended; see build/lmcache-sink.log")
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{self.http_port}/healthcheck", timeout=2).status_code == 200
        return False


@contextlib.contextmanager
def lmcache_server() -> Iterator[Server]:
    server = Server()
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def engine(
    role: str, server: Server, sink: Sink, *, lease_s: int = 30, engine_kwargs: dict[str, Any] | None = None
) -> Iterator[Engine]:
    """One engine with NIXL and the shared tier. A dead server is noticed within five seconds."""
    cache = SharedCacheConfig(sink=sink, mq_timeout_s=5, heartbeat_interval_s=1)
    facts = EngineFacts(
        role=role,  # type: ignore[arg-type]
        platform="cpu",
        host="127.0.0.1",
        listener_port=free_port(),
        engine_id=f"{role}-{uuid.uuid4().hex[:8]}",
        lmcache_url=server.url,
    )
    plan = launch(NixlConfig(kv_lease_duration_s=lease_s), facts, shared_cache=cache)
    kwargs = {
        **ENGINE_KWARGS,
        **SMALL,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 8192,
        **(engine_kwargs or {}),
    }
    arguments = engine_args(
        ModelConfig(id="tiny", source=str(tiny_model()), engine_kwargs=kwargs),
        PoolConfig(),
        platform="cpu",
        kv_transfer_config=plan.kv_transfer_config,
        placement=placement("cpu", kwargs, CpuConfig()),
    )
    env = {**plan.env, "VLLM_SERVER_DEV_MODE": "1"}
    with engine_process(arguments, env, role=role, name=f"engine-sink-{sink}-{role}") as url:
        yield Engine(url)


@dataclass
class Engine:
    """One engine by its URL."""

    url: str
    seen: int = 0

    def complete(self, prompt: list[int], *, max_tokens: int = 8, **more: Any) -> dict[str, Any]:
        """A greedy answer; `more` goes into the body."""
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **more,
        }
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        answer.raise_for_status()
        return dict(answer.json())

    def tokens(self, prompt: list[int], **more: Any) -> list[int]:
        return list(self.complete(prompt, **more)["choices"][0]["token_ids"])

    def prefill(self, prompt: list[int], handoff_id: str, **params: Any) -> dict[str, Any]:
        """A prefill leg, as the gateway sends it; the hand-off parameters."""
        given = {**offer_params(handoff_id), **params}
        return dict(self.complete(prompt, max_tokens=1, kv_transfer_params=given)["kv_transfer_params"])

    def settle(self, *handoff_ids: str) -> None:
        body = {"handoff_ids": list(handoff_ids)}
        httpx.post(f"{self.url}/disagg/v1/settle", json=body, timeout=30).raise_for_status()

    def events(self) -> list[dict[str, Any]]:
        """Everything that happened so far."""
        answer = httpx.get(f"{self.url}/disagg/v1/events", params={"after": 0}, timeout=30).json()
        return list(answer["events"])

    def event(self, timeout_s: float = 30, **wanted: Any) -> dict[str, Any]:
        """The first event with these values, waited for."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [e for e in self.events() if all(e.get(k) == v for k, v in wanted.items())]
            return bool(found)

        wait_until(there, timeout_s, f"event {wanted}", 0.1)
        return found[0]

    def end_of(self, handoff_id: str, timeout_s: float = 60) -> dict[str, Any]:
        """How a hand-off finally ended: `rescued`, `rescue_failed`, or `ended` without adoption."""
        found: list[dict[str, Any]] = []

        def over() -> bool:
            mine = [e for e in self.events() if e.get("id") == handoff_id and e["kind"] != "produced"]
            found[:] = [e for e in mine if e["kind"] != "ended" or not e["adopted"]]
            return bool(found)

        wait_until(over, timeout_s, f"the end of {handoff_id}", 0.1)
        return found[0]

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, so that a prompt can only come from a tier."""
        httpx.post(f"{self.url}/reset_prefix_cache", timeout=30).raise_for_status()

    def stats(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/disagg/v1/stats", timeout=30).json())

    def frees_all(self, timeout_s: float = 10) -> bool:
        """Whether no KV block stays pinned."""
        condition: Callable[[], bool] = lambda: self.stats()["kv_cache_usage"] == 0  # noqa: E731
        return wait_until(condition, timeout_s, "all KV blocks are free") < timeout_s


def prompt(seed: int, tokens: int) -> list[int]:
    """Token ids of the tiny model; no two seeds share a prefix."""
    return [20 + (seed * 97 + i * (7 + seed % 5)) % 1400 for i in range(tokens)]
