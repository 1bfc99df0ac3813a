# SPDX-License-Identifier: Apache-2.0
"""Line 4: bodies, pipelined requests and held-back uploads against a gateway that streams to 20 others meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from disagg.config import GatewayConfig
from tests.prove.report import ROOT, Row
from tests.support.stack import Stack, running

CONFIG = ROOT / "configs" / "quickstart-haproxy.yaml"
LINE = 4
NUM_STREAMS = 20
PAUSE_S = 0.05
IDLE_S = 5.0
"""How soon the gateway must carry nothing but the 20 streams again."""
NUM_UPLOADS = 30
NUM_LEAVERS = 5
_LIMITS = GatewayConfig()
_MIB = 2**20


def others_stream_on() -> list[Row]:
    with running(CONFIG, name="prove-use-intake", change=_room_for_one_more) as stack:
        return asyncio.run(_all(stack))


def _room_for_one_more(config: dict[str, Any]) -> None:
    config["applications"][0]["args"]["model"]["engine_kwargs"]["max_num_seqs"] = NUM_STREAMS + NUM_LEAVERS


@dataclass
class Gateway:
    """The one gateway replica, seen from outside."""

    url: str
    """Its own port: what speaks to it here speaks to its own HTTP server, with no proxy in front."""
    process: psutil.Process
    client: httpx.AsyncClient

    async def metric(self, name: str) -> float:
        text = (await self.client.get(f"{self.url}/metrics")).text
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((name + " ", name + "{"))
        )

    async def pauses(self) -> tuple[float, float]:
        """How often the loop was late by more than the bound, and the longest time so far."""
        text = (await self.client.get(f"{self.url}/metrics")).text
        counts = {
            line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith("disagg_loop_pause_seconds_bucket")
        }
        within = max(n for name, n in counts.items() if f'le="{PAUSE_S}"' in name)
        return max(counts.values()) - within, await self.metric("disagg_loop_longest_pause_seconds")

    @property
    def mib(self) -> float:
        return float(self.process.memory_info().rss) / _MIB


async def _all(stack: Stack) -> list[Row]:
    async with httpx.AsyncClient(timeout=60) as client:
        gateway = await _find(client)
        async with _streams(stack) as gaps:
            await asyncio.sleep(5)
            rows = await _during("nothing but the streams", gateway, gaps, _nothing)
            for what, body in bodies():
                rows += await _during(what, gateway, gaps, lambda raw=body: _post(gateway, raw))
            rows += await _during(f"{NUM_LEAVERS} pipelined leavers", gateway, gaps, lambda: _leavers(gateway))
            rows += await _during(f"{NUM_UPLOADS} uploads held back", gateway, gaps, lambda: _uploads(gateway))
    return rows


def bodies() -> list[tuple[str, bytes]]:
    """The worst that is accepted or refused, by name: many small things, much text, deep nesting."""
    size = _LIMITS.max_body_bytes - 4096
    part = {"type": "text", "text": "a"}
    long = {"type": "text", "text": "a" * 4000}
    text = "word " * (size // 5)
    few = _LIMITS.max_chat_parts - 2
    nested: Any = 1
    for _ in range(95):
        nested = [nested]
    return [
        ("390,000 parts in one message", _chat([{"role": "user", "content": [part] * 390_000}])),
        (
            "as many parts as are accepted",
            _chat([{"role": "user", "content": [long] * few}]),
        ),
        ("as many messages as are accepted", _chat([{"role": "user", "content": "b" * 4000}] * few)),
        ("one message as long as is accepted", _chat([{"role": "user", "content": text}])),
        ("as many tools as are accepted", _chat([{"role": "user", "content": "c"}], tools=_tools(_LIMITS.max_tools))),
        ("500,000 token ids", _completion([7] * (_LIMITS.max_json_values - 20))),
        ("a prompt as long as is accepted", _completion(text)),
        ("metadata 95 deep", _completion("d", metadata={"a": nested})),
    ]


def _tools(number: int) -> list[dict[str, Any]]:
    properties = {f"p{i}": {"type": "string", "description": "x" * 100} for i in range(20)}
    schema = {"type": "object", "properties": properties}
    return [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(number)]


def _chat(messages: list[dict[str, Any]], **fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": messages, "max_tokens": 1, **fields}).encode()


def _completion(prompt: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 1, **fields}).encode()


async def _during(what: str, gateway: Gateway, gaps: Gaps, act: Callable[[], Awaitable[str]]) -> list[Row]:
    """What the gateway and its 20 streams went through while something happened."""
    before, in_flight = gateway.mib, await gateway.metric("disagg_requests_in_flight")
    over, _ = await gateway.pauses()
    gaps.worst = 0.0
    highest = before
    acting = asyncio.ensure_future(act())
    while not acting.done():
        highest = max(highest, gateway.mib)
        await asyncio.wait({acting}, timeout=0.05)
    outcome = acting.result()
    idle = await _idle(gateway, in_flight)
    late, longest = await gateway.pauses()
    figure = f"{late - over:.0f} times, longest yet {1e3 * longest:.0f} ms; worst gap {1e3 * gaps.worst:.0f} ms"
    memory = f"{before:.0f}, {highest:.0f}, {gateway.mib:.0f} MiB"
    return [
        Row(LINE, f"{what}: loop late by more than {1e3 * PAUSE_S:g} ms", figure, "0 times", late == over),
        Row(LINE, f"{what}: {outcome}; in flight again after", idle[0], f"{IDLE_S:g} s", idle[1]),
        Row(LINE, f"{what}: memory before, during, after", memory, "printed", True),
    ]


async def _idle(gateway: Gateway, wanted: float) -> tuple[str, bool]:
    started = time.monotonic()
    while (now := await gateway.metric("disagg_requests_in_flight")) > wanted:
        if time.monotonic() - started > IDLE_S:
            return f"still {now:.0f} of {wanted:.0f}", False
        await asyncio.sleep(0.05)
    return f"{wanted:.0f} after {time.monotonic() - started:.2f} s", True


async def _nothing() -> str:
    await asyncio.sleep(5)
    return "quiet"


async def _post(gateway: Gateway, raw: bytes) -> str:
    path = "/v1/chat/completions" if b'"messages"' in raw[:40] else "/v1/completions"
    answer = await gateway.client.post(gateway.url + path, content=raw, headers={"content-type": "application/json"})
    return f"{len(raw) / _MIB:.1f} MiB, {answer.status_code}"


async def _leavers(gateway: Gateway) -> str:
    """Each sends a long request, a second one on the same connection, and leaves."""
    body = _completion("e", stream=True).replace(b'"max_tokens": 1', b'"max_tokens": 3000')
    writers = []
    for _ in range(NUM_LEAVERS):
        reader, writer = await _connected(gateway)
        writer.write(_head(len(body)) + body)
        await reader.readuntil(b"data: ")
        writer.write(_head(len(body)) + body)
        writers.append(writer)
    await asyncio.sleep(0.2)
    for writer in writers:
        writer.transport.abort()
    return "left"


async def _uploads(gateway: Gateway) -> str:
    """Each holds back the last megabyte of its body, then leaves."""
    size = _LIMITS.max_body_bytes - 4096
    piece = b" " * (size - _MIB)
    writers, answers = [], []

    async def upload() -> None:
        reader, writer = await _connected(gateway)
        writers.append(writer)
        writer.write(_head(size) + piece)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await asyncio.wait_for(writer.drain(), 20)
            answers.append((await reader.readuntil(b"\r\n")).split()[1].decode())

    tasks = [asyncio.ensure_future(upload()) for _ in range(NUM_UPLOADS)]
    await asyncio.sleep(5)
    held = await gateway.metric("disagg_incoming_bytes")
    for writer in writers:
        writer.transport.abort()
    await asyncio.gather(*tasks, return_exceptions=True)
    refused = sum(answer == "503" for answer in answers)
    return f"{held / _MIB:.0f} of {_LIMITS.max_incoming_bytes / _MIB:.0f} MiB held, {refused} answered 503"


async def _connected(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    where = urlsplit(gateway.url)
    return await asyncio.open_connection(where.hostname, where.port)


def _head(length: int) -> bytes:
    lines = [
        "POST /v1/completions HTTP/1.1",
        "host: gateway",
        "content-type: application/json",
        f"content-length: {length}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@dataclass
class Gaps:
    """The longest time between two pieces of any stream since somebody set it back."""

    worst: float = 0.0
    failed: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def _streams(stack: Stack) -> AsyncIterator[Gaps]:
    """Twenty clients that stream one long answer after the other."""
    gaps = Gaps()

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": "tiny", "prompt": f"stream {number}", "max_tokens": 3500, "stream": True, "ignore_eos": True}
        while True:
            async with client.stream("POST", f"{stack.url}/v1/completions", json=body) as answer:
                last = None
                async for _ in answer.aiter_bytes():
                    now = time.monotonic()
                    gaps.worst = max(gaps.worst, now - (last or now))
                    last = now

    limits = httpx.Limits(max_connections=NUM_STREAMS)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        tasks = [asyncio.ensure_future(one(client, number)) for number in range(NUM_STREAMS)]
        try:
            yield gaps
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
    gaps.failed = [repr(end) for end in ended if not isinstance(end, asyncio.CancelledError)]


async def _find(client: httpx.AsyncClient) -> Gateway:
    """The gateway replica's process and port."""
    for process in psutil.process_iter(["cmdline"]):
        if "ServeReplica:disagg:gateway" not in " ".join(process.info["cmdline"] or ()):
            continue
        for connection in process.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN:
                continue
            url = f"http://127.0.0.1:{connection.laddr.port}"
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                if (await client.get(f"{url}/health", timeout=2)).json()["status"]:
                    return Gateway(url, process, client)
    raise RuntimeError("no gateway replica answers at a port of its own")
