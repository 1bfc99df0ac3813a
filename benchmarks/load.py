# SPDX-License-Identifier: Apache-2.0
"""Streams from an OpenAI endpoint at little cost to the measured machine, and checks every token that arrives.

The engines behind the endpoint are fake ones: their answer follows from the prompt, so a lost, repeated or swapped
token is seen. Prints one JSON object.
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
from typing import Any

from benchmarks.connection import BrokenAnswerError, Client
from pools.engine.fake.text import answer, encode, render_chat, word


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


class Events:
    """Splits the body of one streamed answer into events and notes what each brings."""

    def __init__(self, api: str, record: Record) -> None:
        self._marker = b'"content":"' if api == "chat" else b'"text":"'
        self._record = record
        self._body = bytearray()

    def feed(self, piece: bytes, now: float) -> None:
        """Take a piece of the body. A token that is not the expected one is an error of the record."""
        body, record, marker = self._body, self._record, self._marker
        body += piece
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

    def finish(self, status: int) -> None:
        """The answer is whole: a wrong status and missing tokens are errors of the record."""
        record = self._record
        if status != 200:
            record.error = record.error or f"status {status}: {bytes(self._body[:300])!r}"
        elif len(record.arrivals) != len(record.expected):
            record.error = record.error or f"{len(record.arrivals)} of {len(record.expected)} tokens arrived"


def request_body(load: Load, index: int) -> tuple[bytes, list[bytes]]:
    """Body of request `index`, and the texts of the tokens it must bring."""
    letters = random.Random(f"{load.seed}/{index}").choices("abcdefghijklmnopqrstuvwxyz", k=load.prompt_tokens)
    prompt = "".join(letters)
    body: dict[str, Any] = {"model": load.model, "max_tokens": load.max_tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    if load.api == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
        ids = encode(render_chat(body["messages"]))
    else:
        body["prompt"] = ids = encode(prompt)
    return json.dumps(body).encode(), [word(token).encode() for token in answer(ids, load.max_tokens)]


async def run(load: Load) -> dict[str, Any]:
    """Send the load; the summary. Streams start spread over 100 ms so that their tokens do not come together."""
    path = "/v1/chat/completions" if load.api == "chat" else "/v1/completions"
    clients = [Client(load.url) for _ in range(load.streams)]
    bodies = [request_body(load, index) for index in range(load.requests)]
    work = [(clients[0].post(path, body), Record(0.0, expected)) for body, expected in bodies]
    todo = iter(work)

    async def stream(number: int) -> None:
        client = clients[number]
        await asyncio.sleep(0.1 * number / load.streams)
        for request, record in todo:
            events = Events(load.api, record)
            record.started_at = time.perf_counter()
            try:
                events.finish(await client.send(request, events.feed))
            except BrokenAnswerError as exc:
                record.error = record.error or str(exc)
        client.close()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(load.streams):
            group.create_task(stream(number))
    duration_s = time.perf_counter() - began
    found = summary([record for _, record in work], duration_s)
    return found | {"reconnects": sum(client.num_reconnects for client in clients)}


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
