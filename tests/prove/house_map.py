# SPDX-License-Identifier: Apache-2.0
"""The life of one streamed chat with a hand-off, as the files of this project that a real request goes through.

A profiler notes each call that enters a file of the three packages from another one, in the gateway's thread. What its
own loops do meanwhile is left out. The way in ends when the first byte of the decode
leg's answer arrives; the way out is what one chunk in the middle of the answer goes through.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import uvicorn

from disagg.config import GatewayConfig
from disagg.gateway.app import Gateway, create_app
from disagg.gateway.front.render import VllmRenderer
from disagg.gateway.replicas.membership import DECODE, PREFILL
from disagg.gateway.stream.splice import SplicingProtocol
from disagg.routing.views import ReplicaInfo
from pools.config import CpuConfig, ModelConfig, PoolConfig
from pools.plan.launch import engine_args
from pools.plan.placement import placement
from tests.prove.report import ROOT, Row
from tests.support.engines import transfer_launch
from tests.support.gateway_stack import JSON_HEADERS, QuietServer, StubScaler, connected, request_bytes, until
from tests.support.stack import ENGINE_KWARGS, engine_process, free_port, tiny_model
from transport.config import NixlConfig
from transport.transports import describe

PACKAGES = tuple(str(ROOT / name) + "/" for name in ("disagg", "pools", "transport"))
LOOPS = frozenset(("_follow", "_sweep", "sweep", "watch"))
"""Coroutines of the gateway that run beside its requests."""
MAX_FILES_IN, MAX_FILES_OUT, MAX_VISITS = 12, 6, 2
NUM_TOKENS = 24
CPU_BLOCK_SIZE = 128
"""Tokens in a KV block of vLLM on a CPU."""


@dataclass(frozen=True)
class Engine:
    """One engine of the pair, in a process of its own."""

    pool: Literal["prefill", "decode"]
    url: str
    engine_id: str
    block_size: int
    vocab_size: int

    @property
    def info(self) -> ReplicaInfo:
        """As its replica would have published it."""
        return ReplicaInfo(self.pool, self.pool, self.url, self.engine_id, self.pool, self.block_size, self.vocab_size)


@dataclass
class Trace:
    """Files in the order in which calls entered them; calls within one file are one visit."""

    decode_url: str
    way_in: list[str] = field(default_factory=list)
    chunks: list[list[str]] = field(default_factory=list)
    """Of each read from the decode engine's socket once its answer has begun."""
    begun: bool = False
    _seen: dict[int, FrameType] = field(default_factory=dict)
    """Frames by identity; keeping them keeps their identities unique."""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGES):
            return
        if id(frame) in self._seen or _is_beside(frame):
            # A coroutine that goes on was called before.
            return
        self._seen[id(frame)] = frame
        file = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
        name = frame.f_code.co_name
        if name == "data_received" and self.begun:
            self.chunks.append([])
        elif name == "_on_head" and getattr(frame.f_locals.get("self"), "_url", None) == self.decode_url:
            self.begun = True
        target = self.chunks[-1] if self.chunks else None if self.begun else self.way_in
        if target is not None and (not target or target[-1] != file):
            target.append(file)


def _is_beside(frame: FrameType) -> bool:
    """Whether one of the gateway's own loops is at the bottom of the stack."""
    at: FrameType | None = frame
    while at is not None:
        if at.f_code.co_name in LOOPS and at.f_code.co_filename.startswith(PACKAGES):
            return True
        at = at.f_back
    return False


@contextlib.contextmanager
def traced(trace: Trace) -> Iterator[None]:
    sys.setprofile(trace)
    try:
        yield
    finally:
        sys.setprofile(None)


@contextlib.contextmanager
def real_engine(pool: Literal["prefill", "decode"]) -> Iterator[Engine]:
    """A vLLM engine with NIXL."""
    arguments, env = transfer_launch(pool, NixlConfig(), listener_port=free_port())
    model = json.loads((tiny_model() / "config.json").read_text())
    with engine_process(arguments, env, role=pool, name=f"house-map-{pool}") as url:
        engine_id = arguments["kv_transfer_config"]["engine_id"]
        yield Engine(pool, url, engine_id, CPU_BLOCK_SIZE, model["vocab_size"])


@contextlib.contextmanager
def fake_engine(pool: Literal["prefill", "decode"]) -> Iterator[Engine]:
    """The same contract without a model, in seconds."""
    argv = [sys.executable, "-m", "pools.engine.fake", "--role", pool, "--engine-id", pool, "--incarnation", pool]
    with subprocess.Popen([*argv, "--itl-ms", "10"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Engine(pool, process.stdout.readline().strip(), pool, 16, 1000)
        finally:
            process.terminate()


@contextlib.asynccontextmanager
async def served(prefill: Engine, decode: Engine) -> AsyncIterator[str]:
    """URL of a gateway over the two, put together as in Serve, when it has moved KV between them."""
    model = ModelConfig(id="tiny", source=str(tiny_model()), engine_kwargs=ENGINE_KWARGS)
    placed = placement("cpu", ENGINE_KWARGS, CpuConfig())
    renderer = VllmRenderer(engine_args(model, PoolConfig(), platform="cpu", kv_transfer_config={}, placement=placed))
    gateway = Gateway(
        model_id="tiny",
        config=GatewayConfig(),
        renderer=renderer,
        scaler=StubScaler(),
        max_model_len=renderer.max_model_len,
        transport=describe(NixlConfig()),
    )
    config = uvicorn.Config(create_app(gateway), log_level="warning", access_log=False, http=SplicingProtocol)
    server = QuietServer(config)
    sock = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        await until(lambda: server.started)
        gateway.membership.replace(PREFILL, [prefill.info])
        gateway.membership.replace(DECODE, [decode.info])
        await until(lambda: not gateway.membership.cold_pairs(), timeout_s=60)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


async def trace_chat(url: str, decode_url: str) -> Trace:
    """Trace one chat that streams `NUM_TOKENS` tokens after a hand-off."""
    await chat(url)  # What is made at the first use is no part of the life of a request.
    await asyncio.sleep(0.1)  # The server hears of that connection's end, which is none either.
    trace = Trace(decode_url)
    with traced(trace):
        await chat(url)
    return trace


async def chat(url: str) -> None:
    """One streamed chat; raises when it was not handed off or did not end well."""
    text = "tell me something that takes more than one block of KV " * 20
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": NUM_TOKENS,
        "stream": True,
        "ignore_eos": True,
    }
    async with connected(url) as connection:
        connection.writer.write(request_bytes("POST", "/v1/chat/completions", JSON_HEADERS, json.dumps(body).encode()))
        reply = await connection.reply()
    assert reply.status == 200 and reply.events[-1] == "[DONE]", reply
    assert reply.headers["x-disagg-prefill"] == PREFILL, reply.headers


def rows(trace: Trace) -> list[Row]:
    """Line 3."""
    middle = trace.chunks[2:-3]
    widest = max(middle, key=lambda files: len(set(files)), default=[])
    visits = Counter(trace.way_in)
    file, most = visits.most_common(1)[0]
    return [
        Row(3, "files on the way in", str(len(visits)), f"at most {MAX_FILES_IN}", len(visits) <= MAX_FILES_IN),
        Row(3, "visits of one file on the way in", f"{most} ({file})", f"at most {MAX_VISITS}", most <= MAX_VISITS),
        Row(3, "files on the way out, a chunk", str(len(set(widest))), f"at most {MAX_FILES_OUT}",
            bool(middle) and len(set(widest)) <= MAX_FILES_OUT),
    ]  # fmt: skip


def show(trace: Trace) -> None:
    """Print the map: each step of the way in, then a chunk's way out."""
    print("way in:")
    for number, file in enumerate(trace.way_in, 1):
        print(f"{number:>4}  {file}")
    for file, times in Counter(trace.way_in).most_common():
        print(f"      {times} x {file}")
    print("way out, a chunk:")
    for files in sorted({tuple(files) for files in trace.chunks[2:-3]}, key=len):
        print("      " + " -> ".join(files))


def traced_chat(*, fake: bool = False) -> Trace:
    """The trace of one chat over two engines."""
    engine = fake_engine if fake else real_engine

    async def over(prefill: Engine, decode: Engine) -> Trace:
        async with served(prefill, decode) as url:
            return await trace_chat(url, decode.url)

    with engine("prefill") as prefill, engine("decode") as decode:
        return asyncio.run(over(prefill, decode))


def newcomers_map(*, fake: bool = False) -> list[Row]:
    """Print the map and judge it."""
    trace = traced_chat(fake=fake)
    show(trace)
    return rows(trace)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.prove.house map", description=__doc__)
    parser.add_argument("--fake", action="store_true", help="over fake engines, in seconds")
    found = newcomers_map(fake=parser.parse_args(argv).fake)
    for row in found:
        print(row.text())
    return 0 if all(row.holds for row in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
