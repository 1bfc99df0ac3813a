# SPDX-License-Identifier: Apache-2.0
"""A whole application, started with `disagg serve` as a user would and ended with Ctrl-C. Linux only.

Also the reference: one aggregated vLLM engine with the same settings, without Ray and without KV transfer.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import psutil
import yaml

from disagg.sdk.client import Client
from pools.client.routes import ENGINE_KEY_HEADER
from pools.config import CpuConfig
from pools.plan.launch import HOST_WORKER_EXTENSION, engine_env
from tests.support.replaced import PYTHONPATH
from tests.support.zygote import ForkedProcess, Zygote

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
ENGINE_KEY_FILE = ROOT / ".cache" / "engine-key"
ENGINE_KWARGS: dict[str, Any] = {
    "max_model_len": 4096,
    "max_num_seqs": 32,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
}
"""Of both pools and of the reference engine, so that answers can be compared."""
_PORTS = (20_000, 32_000)
"""Between the ports of Ray's workers and those that Linux gives out by itself."""


def free_port() -> int:
    """A TCP port that is free, and stays so until a server that starts slowly binds it: the kernel gives no such port
    to connections and servers that leave the choice to it."""
    # Not the generator that tests seed: two processes with one seed would choose the same ports.
    for port in random.SystemRandom().sample(range(*_PORTS), 100):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port among 100 of {_PORTS[0]} to {_PORTS[1]}")


def tiny_model() -> Path:
    """The tiny checkpoint, written when it is missing."""
    from disagg.tiny_model import write_tiny_model

    path = ROOT / ".cache" / "tiny-model"
    if not (path / "config.json").exists():
        write_tiny_model(path)
    return path


def engine_headers() -> dict[str, str]:
    """What a request to an engine of `running` has to bring; without an effect on one of `engine_process`."""
    return {ENGINE_KEY_HEADER: ENGINE_KEY_FILE.read_text().strip()}


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, poll_s: float = 0.1) -> float:
    """Seconds until `condition` held. Raises TimeoutError that names `what`."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"after {timeout_s:g} s still not: {what}")
        time.sleep(poll_s)
    return time.monotonic() - started


@dataclass
class Stack:
    """One running application."""

    url: str
    admin_key: str
    process: subprocess.Popen[bytes]
    log: Path
    output: list[str] = field(default_factory=list)

    def client(self) -> Client:
        return Client(self.url, api_key=self.admin_key, timeout_s=60)

    def stats(self) -> dict[str, list[dict[str, Any]]]:
        """`/disagg/v1/stats` of every replica, by pool."""
        import httpx

        with self.client() as client:
            pools = client.pools()
        return {
            pool.name: [
                httpx.get(f"{r.url}/disagg/v1/stats", headers=engine_headers(), timeout=10).json()
                for r in pool.replicas
                if r.url
            ]
            for pool in pools
        }

    def engine_metric(self, pool: str, name: str) -> float:
        """Sum of one of vLLM's own Prometheus metrics over a pool's replicas."""
        import httpx

        total = 0.0
        with self.client() as client:
            replicas = client.pool(pool).status().replicas
        for replica in replicas:
            for line in httpx.get(f"{replica.url}/metrics", timeout=10).text.splitlines():
                if line.startswith(name) and line[len(name)] in "{ ":
                    total += float(line.rsplit(" ", 1)[1])
        return total

    def stop(self, timeout_s: float = 120) -> tuple[int, float]:
        """Exit code of `disagg serve` after Ctrl-C, and the seconds it took."""
        started = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout_s)
        return code, time.monotonic() - started


def write_config(source: Path, *, name: str, port: int, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A copy of a shipped config with another port, the tiny model's absolute path and `change` applied.

    Its engines ask for a key that the tests know, see `engine_headers`.
    """
    config = yaml.safe_load(source.read_text())
    config.setdefault("http_options", {})["port"] = port
    args = config["applications"][0]["args"]
    args["model"]["source"] = str(tiny_model())
    args["model"]["engine_kwargs"] = {**args["model"].get("engine_kwargs", {}), **ENGINE_KWARGS}
    args["gateway"] = {**args.get("gateway", {}), "admin": {"key_file": str(ROOT / ".cache" / "admin-key")}}
    if not ENGINE_KEY_FILE.exists():
        ENGINE_KEY_FILE.parent.mkdir(exist_ok=True)
        ENGINE_KEY_FILE.write_text(secrets.token_urlsafe(32) + "\n")
    args["engine_key_file"] = str(ENGINE_KEY_FILE)
    if change is not None:
        change(config)
    path = BUILD / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def _sizes(config: Path) -> dict[str, int]:
    """Number of replicas of the pools that a config file gives a fixed size."""
    deployments = yaml.safe_load(config.read_text())["applications"][0].get("deployments", [])
    fixed = {one["name"]: one.get("num_replicas") for one in deployments}
    return {pool: size for pool in ("prefill", "decode") if isinstance(size := fixed.get(pool), int)}


@contextlib.contextmanager
def running(
    source: Path, *, name: str, change: Callable[[dict[str, Any]], None] | None = None, timeout_s: float = 300
) -> Iterator[Stack]:
    """The application of a config file, ready with all its replicas there and every pair warm; stopped afterwards."""
    port = free_port()
    config = write_config(source, name=name, port=port, change=change)
    sizes = _sizes(config)
    log = BUILD / f"{name}.log"
    note_start("Serve application")
    process = subprocess.Popen(
        [sys.executable, "-m", "disagg.cli.main", "serve", str(config), "--log-file", str(log)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONUNBUFFERED": "1"},
    )
    stack = Stack(f"http://127.0.0.1:{port}", "", process, log)
    reader = threading.Thread(target=_collect, args=(process, stack.output), daemon=True)
    reader.start()
    try:

        def ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError("disagg serve ended:\n" + "\n".join(stack.output[-30:]))
            return is_warm(stack.url, sizes)

        # Asking takes time from the engines that start.
        wait_until(ready, timeout_s, f"{name} serves with every pair warm; see {log}", 1.0)
        stack.admin_key = (ROOT / ".cache" / "admin-key").read_text().strip()
        yield stack
    finally:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                stack.stop()
        if process.poll() is None:
            process.kill()


def _collect(process: subprocess.Popen[bytes] | ForkedProcess, lines: list[str], log: BinaryIO | None = None) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if log is not None:
            log.write(line)
            log.flush()
        lines.append(line.decode(errors="replace").rstrip("\n"))


def is_warm(url: str, sizes: Mapping[str, int] | None = None) -> bool:
    """Whether the application at `url` serves and every pair has moved KV, of at least `sizes` replicas a pool."""
    import httpx

    try:
        answer = httpx.get(f"{url}/health", timeout=5)
        body = answer.json()
    except (httpx.HTTPError, ValueError):
        return False
    if answer.status_code != 200 or body.get("status") != "ok" or body.get("num_cold_pairs") != 0:
        return False
    return all(body["pools"][pool] >= size for pool, size in (sizes or {}).items())


@contextlib.contextmanager
def aggregated_engine(
    *, name: str = "aggregated", engine_kwargs: dict[str, Any] | None = None, timeout_s: float = 300
) -> Iterator[str]:
    """URL of one ordinary vLLM engine with the settings of the pools, and `engine_kwargs` on top."""
    arguments = {
        **ENGINE_KWARGS,
        "enforce_eager": True,
        "dtype": "bfloat16",
        **(engine_kwargs or {}),
        "model": str(tiny_model()),
        "served_model_name": ["tiny"],
        "distributed_executor_backend": "mp",
        "worker_extension_cls": HOST_WORKER_EXTENSION,
    }
    with engine_process(arguments, {}, role="decode", name=name, timeout_s=timeout_s) as url:
        yield url


@contextlib.contextmanager
def engine_process(
    arguments: dict[str, Any], env: dict[str, str], *, role: str, name: str, timeout_s: float = 300
) -> Iterator[str]:
    """URL of one real engine in a process of its own, with vLLM's `arguments`. Killed afterwards."""
    settings = {"arguments": arguments, "env": env, "role": role}
    BUILD.mkdir(exist_ok=True)
    note_start("engine")
    with (BUILD / f"{name}.log").open("wb") as log:
        process = _zygote.fork(settings, log) if _zygote is not None else _spawn_engine(settings, log)
        lines: list[str] = []
        threading.Thread(target=_collect, args=(process, lines, log), daemon=True).start()
        try:

            def up() -> bool:
                if process.poll() is not None:
                    raise RuntimeError(f"the engine {name} ended; see build/{name}.log")
                return any(line.startswith("http://") for line in lines)

            wait_until(up, timeout_s, f"the engine {name} is up", 0.05)
            yield next(line for line in lines if line.startswith("http://"))
        finally:
            # vLLM's own shutdown waits five seconds for a worker that does not end, and then does the same.
            kill_family(process.pid)
            process.wait(60)
            assert process.stdin is not None
            process.stdin.close()


def _engine_env() -> dict[str, str]:
    return engine_env("cpu", CpuConfig(), host="127.0.0.1")


def _spawn_engine(settings: Mapping[str, Any], log: BinaryIO) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.engine_process", json.dumps(dict(settings))],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, **_engine_env(), "PYTHONPATH": PYTHONPATH},
    )


_zygote: Zygote | None = None
"""Where engines come from; None: each is a program of its own, as in the proofs and benchmarks."""


@contextlib.contextmanager
def forked_engines() -> Iterator[None]:
    """Meanwhile `engine_process` forks its engines from one process, see `tests.support.zygote`."""
    global _zygote
    BUILD.mkdir(exist_ok=True)
    _zygote = Zygote(_engine_env(), cwd=ROOT, log=BUILD / f"zygote-{os.getpid()}.log")
    try:
        yield
    finally:
        _zygote.stop()
        _zygote = None


def kill_family(pid: int) -> None:
    """SIGKILL a process and its descendants. Python's resource tracker goes by itself, and removes shared memory."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if not any("resource_tracker" in argument for argument in one.cmdline()):
                    one.kill()


@contextlib.contextmanager
def side_by_side(*contexts: AbstractContextManager[T]) -> Iterator[list[T]]:
    """What the contexts yield, entered at the same time, each in a thread; they end in turn.

    When one cannot be entered the others are left, and its exception is raised.
    """
    with contextlib.ExitStack() as entered, ThreadPoolExecutor(len(contexts)) as threads:
        futures = [threads.submit(context.__enter__) for context in contexts]
        wait(futures)
        for context, future in zip(contexts, futures, strict=True):
            if future.exception() is None:
                entered.push(context.__exit__)
        yield [future.result() for future in futures]


def note_start(what: str) -> None:
    """Count a start, where a test session asks for it."""
    if path := os.environ.get("DISAGG_TEST_STARTS"):
        with open(path, "a") as file:
            file.write(f"{what}\n")
