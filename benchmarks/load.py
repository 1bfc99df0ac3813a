# SPDX-License-Identifier: Apache-2.0
"""Streams from an OpenAI endpoint at little cost to the measured machine, and checks every token that arrives.

The engines behind the endpoint are fake ones: their answer follows from the prompt, so a lost, repeated or swapped
token is seen. Reads the sockets as an asyncio protocol under uvloop; prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from pools.engine.fake_text import answer, encode, render_chat, word


@dataclass(frozen=True)
class Load:
    """What to send. Completion prompts are token ids, so that no tokenizer on the way decides the answer; a chat is
    text, and its answer is known only where the fake engine tokenises it itself.
    """

    url: str
    model: str = "tiny"
    api: str = "completions"
    streams: int = 16
    """Requests in flight."""
    requests: int = 16
    max_tokens: int = 100
    prompt_tokens: int = 64
    seed: int = 0


@dataclass
class Record:
    """What one request brought. Times are seconds of `time.perf_counter`."""

    started_at: float
    expected: list[bytes]
    arrivals: list[float] = field(default_factory=list)
    error: str | None = None


class Stream(asyncio.Protocol):
    """One keep-alive connection that runs one streamed request at a time."""

    def __init__(self, api: str) -> None:
        self._marker = b'"content":"' if api == "chat" else b'"text":"'
        self._buffer = bytearray()
        self._body = bytearray()
        self._in_body = False
        self._close_after = False
        self._record = Record(0.0, [])
        self._done: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    @property
    def closed(self) -> bool:
        """True when the server closed the connection, so that the next request needs another."""
        return self._transport is None or self._transport.is_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end(f"connection closed: {exc}")

    async def run(self, request: bytes, record: Record) -> None:
        """Send one request and return when its answer is whole or broken; never raises for either."""
        assert self._transport is not None
        self._buffer.clear()
        self._body.clear()
        self._in_body = False
        self._record = record
        self._done = asyncio.get_running_loop().create_future()
        record.started_at = time.perf_counter()
        self._transport.write(request)
        await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _end(self, error: str | None) -> None:
        if self._done is not None and not self._done.done():
            self._record.error = self._record.error or error
            self._done.set_result(None)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._buffer += data
        if not self._in_body and not self._read_head():
            return
        self._read_chunks(now)

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._buffer[:end]).lower()
        del self._buffer[: end + 4]
        if b" 200 " not in head.split(b"\r\n")[0] + b" " or b"transfer-encoding: chunked" not in head:
            self._end(f"answer: {head[:200]!r} {bytes(self._buffer[:300])!r}")
            return False
        self._close_after = b"\r\nconnection: close" in head
        self._in_body = True
        return True

    def _read_chunks(self, now: float) -> None:
        buffer = self._buffer
        while (line := buffer.find(b"\r\n")) >= 0:
            size = int(buffer[:line].split(b";")[0], 16)
            if len(buffer) < line + 4 + size:
                return
            self._body += buffer[line + 2 : line + 2 + size]
            del buffer[: line + 4 + size]
            self._read_events(now)
            if size == 0:
                self._finish()
                return

    def _read_events(self, now: float) -> None:
        body, record, marker = self._body, self._record, self._marker
        while (end := body.find(b"\n\n")) >= 0:
            event = bytes(body[:end])
            del body[: end + 2]
            start = event.find(marker)
            if start < 0:
                if b'"error"' in event:
                    record.error = record.error or event.decode(errors="replace")[:300]
                continue
            text = event[start + len(marker) : event.find(b'"', start + len(marker))]
            if not text:
                continue
            i = len(record.arrivals)
            record.arrivals.append(now)
            if i >= len(record.expected) or text != record.expected[i]:
                record.error = record.error or f"token {i} is {text!r}"

    def _finish(self) -> None:
        got, due = len(self._record.arrivals), len(self._record.expected)
        if self._close_after:
            self.close()
        self._end(None if got == due else f"{got} of {due} tokens arrived")


def request_bytes(load: Load, index: int) -> tuple[bytes, list[bytes]]:
    """Request `index` as it goes over the wire, and the texts of the tokens it must bring."""
    letters = random.Random(f"{load.seed}/{index}").choices("abcdefghijklmnopqrstuvwxyz", k=load.prompt_tokens)
    prompt = "".join(letters)
    body: dict[str, Any] = {"model": load.model, "max_tokens": load.max_tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    if load.api == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
        ids = encode(render_chat(body["messages"]))
    else:
        body["prompt"] = ids = encode(prompt)
    payload = json.dumps(body).encode()
    parts = urlsplit(load.url)
    path = "/v1/chat/completions" if load.api == "chat" else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(payload)}\r\n\r\n"
    return head.encode() + payload, [word(token).encode() for token in answer(ids, load.max_tokens)]


async def run(load: Load) -> dict[str, Any]:
    """Send the load; the summary. Streams start spread over 100 ms so that their tokens do not come together."""
    work = [request_bytes(load, index) for index in range(load.requests)]
    records = [Record(0.0, expected) for _, expected in work]
    todo = iter(range(load.requests))
    parts = urlsplit(load.url)
    host, port = parts.hostname or "", parts.port or 80
    loop = asyncio.get_running_loop()

    async def stream(number: int) -> None:
        await asyncio.sleep(0.1 * number / load.streams)
        protocol: Stream | None = None
        for index in todo:
            if protocol is None or protocol.closed:
                _, protocol = await loop.create_connection(lambda: Stream(load.api), host, port)
            await protocol.run(work[index][0], records[index])
            if records[index].error:
                protocol.close()
                protocol = None
        if protocol is not None:
            protocol.close()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(load.streams):
            group.create_task(stream(number))
    return summary(records, time.perf_counter() - began)


def summary(records: Sequence[Record], duration_s: float) -> dict[str, Any]:
    """Counts, and percentiles in milliseconds."""
    errors = [record.error for record in records if record.error]
    first = [record.arrivals[0] - record.started_at for record in records if record.arrivals]
    gaps = [b - a for record in records for a, b in zip(record.arrivals, record.arrivals[1:], strict=False)]
    return {
        "requests": len(records),
        "errors": len(errors),
        "error_sample": errors[:3],
        "tokens": sum(len(record.arrivals) for record in records),
        "duration_s": round(duration_s, 3),
        "ttft_ms": percentiles(first),
        "itl_ms": percentiles(gaps),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {"p50": round(1e3 * seconds[0], 3)} if seconds else {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}": round(1e3 * cuts[p - 1], 3) for p in (50, 90, 99)} | {"max": round(1e3 * max(seconds), 3)}


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--api", choices=("completions", "chat"), default="completions")
    parser.add_argument("--streams", type=int, default=16, help="requests in flight")
    parser.add_argument("--requests", type=int, default=None, help="default: as many as streams")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    args["requests"] = args["requests"] or args["streams"]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(run(Load(**args)))))


if __name__ == "__main__":
    main()
