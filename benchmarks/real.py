# SPDX-License-Identifier: Apache-2.0
"""Latency that the gateway adds to real engines, against a caller who does the same hand-off by hand.

One application of one prefill and one decode engine. Every prompt goes through the gateway and, by hand, to the same
two engines: a prefill leg to one, its hand-off parameters with the request to the other. Both sides send text, use
the same client and take turns, so what is left of the difference is the gateway and what is in front of it. The same
prompt has another `cache_salt` on each side, so that neither finds the other's prefix.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.connection import BrokenAnswerError, Client
from benchmarks.load import percentiles
from disagg.gateway.front.fields import PATHS
from pools.client.messages import offered
from tests.support.stack import engine_headers, running, tiny_model
from transport.handoff_params import REMOTE_DECODE

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"haproxy": ROOT / "configs/quickstart-haproxy.yaml", "proxy": ROOT / "configs/quickstart.yaml"}
SIDES = ("hand", "gateway")
_PATH = PATHS["completions"]
_MARKER = b'"text":"'
_RESAMPLES = 300


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    clients: tuple[int, ...] = (1, 4)
    """Requests in flight, one figure each."""
    requests: int = 120
    """Requests a side, after the warm-up."""
    warm_up: int = 8
    prompt_tokens: int = 500
    max_tokens: int = 64


@dataclass
class Sample:
    """One request. Times are seconds of `time.perf_counter`."""

    prompt: int
    started_at: float = 0.0
    prefilled_at: float = 0.0
    """When the caller by hand had the hand-off parameters."""
    arrivals: list[float] = field(default_factory=list)
    """Of each event that brings tokens."""
    events: list[bytes] = field(default_factory=list)
    ended: bool = False
    """`[DONE]` has come."""
    error: str | None = None
    _body: bytearray = field(default_factory=bytearray)

    def feed(self, piece: bytes, now: float) -> None:
        """Take a piece of a streamed body."""
        self._body += piece
        while (end := self._body.find(b"\n\n")) >= 0:
            event = bytes(self._body[:end])
            del self._body[: end + 2]
            if _MARKER in event:
                self.arrivals.append(now)
                self.events.append(event)
            elif event == b"data: [DONE]":
                self.ended = True
            else:
                self.error = self.error or event.decode(errors="replace")[:300]

    def finish(self, status: int, max_tokens: int) -> None:
        """The answer is whole. Fewer events than tokens are no error: an engine that falls behind puts two in one."""
        if status != 200:
            self.error = self.error or f"status {status}: {bytes(self._body[:300])!r}"
        elif not self.ended or not 1 < len(self.arrivals) <= max_tokens:
            self.error = self.error or f"{len(self.arrivals)} events for {max_tokens} tokens, ended: {self.ended}"

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0] - self.started_at

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def text(self) -> str:
        """The answer; parsed afterwards, so that it costs the measurement nothing."""
        return "".join(json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in self.events)


class Caller(Protocol):
    """One way to get a completion."""

    async def complete(self, sample: Sample, request: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class ThroughGateway:
    """What a user does."""

    def __init__(self, url: str) -> None:
        self._client = Client(url)

    async def complete(self, sample: Sample, request: dict[str, Any]) -> None:
        payload = self._client.post(_PATH, json.dumps(request).encode())
        sample.started_at = time.perf_counter()
        sample.finish(await self._client.send(payload, sample.feed), request["max_tokens"])

    def close(self) -> None:
        self._client.close()


class ByHand:
    """The two legs without a gateway: one prefill engine, one decode engine, a connection to each."""

    def __init__(self, prefill_url: str, decode_url: str) -> None:
        self._prefill = Client(prefill_url)
        self._decode = Client(decode_url)
        self._key = engine_headers()

    async def complete(self, sample: Sample, request: dict[str, Any]) -> None:
        wanted = ("model", "prompt", "temperature", "ignore_eos", "cache_salt")
        leg = {name: request[name] for name in wanted} | {"max_tokens": 1, "kv_transfer_params": REMOTE_DECODE}
        payload = self._prefill.post(_PATH, json.dumps(leg).encode(), self._key)
        answer = bytearray()
        sample.started_at = time.perf_counter()
        status = await self._prefill.send(payload, lambda piece, _: answer.extend(piece))
        params = offered(json.loads(answer).get("kv_transfer_params")) if status == 200 else None
        if params is None:
            raise BrokenAnswerError(f"prefill leg: status {status}, {bytes(answer[:300])!r}")
        sample.prefilled_at = time.perf_counter()
        request = request | {"kv_transfer_params": params}
        payload = self._decode.post(_PATH, json.dumps(request).encode(), self._key)
        sample.finish(await self._decode.send(payload, sample.feed), request["max_tokens"])

    def close(self) -> None:
        self._prefill.close()
        self._decode.close()


def prompts(num_tokens: int, seed: int) -> Iterator[str]:
    """Different texts, each of `num_tokens` tokens or a few less; they differ from their first words on."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_model() / "tokenizer.json"))
    words = "river stone cloud engine paper lamp seven north garden quiet signal copper window letter march".split()
    for number in range(10_000):
        chooser = random.Random(f"{seed}/{number}")
        ids = tokenizer.encode(f"{chooser.randrange(10**9)} {' '.join(chooser.choices(words, k=num_tokens))}").ids
        yield tokenizer.decode(ids[: num_tokens - 4])


async def measure(
    callers: Callable[[str], Caller], plan: Plan, *, clients: int, texts: Iterator[str]
) -> dict[str, list[Sample]]:
    """The samples of each side, prompt by prompt in the same order.

    The sides take turns in blocks, by hand first in every other round: one request a block for one client, three for
    each of several.
    """
    sides = {side: [callers(side) for _ in range(clients)] for side in SIDES}
    found: dict[str, list[Sample]] = {side: [] for side in SIDES}
    each = 1 if clients == 1 else 3
    block = each * clients
    first_prompt = 0

    async def client(side: str, caller: Caller, work: Sequence[tuple[Sample, str]]) -> None:
        for sample, text in work:
            request = {"model": "tiny", "prompt": text, "max_tokens": plan.max_tokens, "temperature": 0}
            request |= {"ignore_eos": True, "stream": True, "cache_salt": f"{side}-{clients}-{sample.prompt}"}
            try:
                await caller.complete(sample, request)
            except BrokenAnswerError as exc:
                sample.error = sample.error or str(exc)

    num_rounds = -(-(plan.warm_up + plan.requests) // block)
    for turn in range(num_rounds):
        chosen = [next(texts) for _ in range(block)]
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            samples = [Sample(first_prompt + i) for i in range(block)]
            work = list(zip(samples, chosen, strict=True))
            async with asyncio.TaskGroup() as group:
                for number, caller in enumerate(sides[side]):
                    group.create_task(client(side, caller, work[number * each : (number + 1) * each]))
            found[side] += samples
        first_prompt += block
    for caller in (caller for side in sides.values() for caller in side):
        caller.close()
    return {side: samples[plan.warm_up :] for side, samples in found.items()}


def compare(samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """Percentiles of both sides and what the gateway adds, with intervals that hold 95 % of bootstrap resamples."""
    errors = [sample.error for side in SIDES for sample in samples[side] if sample.error]
    pairs = [(a, b) for a, b in zip(samples["hand"], samples["gateway"], strict=True) if not (a.error or b.error)]
    result: dict[str, Any] = {"pairs": len(pairs), "errors": len(errors), "error_sample": errors[:3]}
    if not pairs:
        return result
    for side, chosen in (("hand", [a for a, _ in pairs]), ("gateway", [b for _, b in pairs])):
        gaps = [gap for sample in chosen for gap in sample.gaps_s]
        result[side] = {
            "ttft_ms": percentiles([sample.ttft_s for sample in chosen]),
            "itl_ms": percentiles(gaps),
            "shared_reads": sum(gap == 0 for gap in gaps),
            "events": sum(len(sample.arrivals) for sample in chosen),
        }
    result["same_answers"] = sum(a.text() == b.text() for a, b in pairs)
    result["prefill_leg_ms"] = percentiles([a.prefilled_at - a.started_at for a, _ in pairs])
    ttft = [(a.ttft_s, b.ttft_s) for a, b in pairs]
    gaps_s = [(a.gaps_s, b.gaps_s) for a, b in pairs]
    draws = [random.Random(i).choices(range(len(pairs)), k=len(pairs)) for i in range(_RESAMPLES)]
    result["added_ttft_ms"] = _with_interval([_added_ttft_ms([ttft[i] for i in draw]) for draw in draws])
    result["added_ttft_ms"]["p50"] = round(_added_ttft_ms(ttft), 3)
    result["added_itl_percent"] = _with_interval([_added_itl_percent([gaps_s[i] for i in draw]) for draw in draws])
    result["added_itl_percent"]["p50"] = round(_added_itl_percent(gaps_s), 2)
    result["paired_ttft_ms"] = round(1e3 * statistics.median(b - a for a, b in ttft), 3)
    return result


def _added_ttft_ms(ttft: Sequence[tuple[float, float]]) -> float:
    return 1e3 * (statistics.median(b for _, b in ttft) - statistics.median(a for a, _ in ttft))


def _added_itl_percent(gaps: Sequence[tuple[list[float], list[float]]]) -> float:
    by_hand = statistics.median(gap for pair in gaps for gap in pair[0])
    return 100 * (statistics.median(gap for pair in gaps for gap in pair[1]) / by_hand - 1)


def _with_interval(drawn: Sequence[float]) -> dict[str, float]:
    ordered = sorted(drawn)
    return {"low": round(ordered[len(ordered) // 40], 3), "high": round(ordered[-1 - len(ordered) // 40], 3)}


def run(plan: Plan, fronts: Sequence[str] = tuple(CONFIGS)) -> dict[str, Any]:
    """Each front in turn, never two applications at once; results by front and number of clients."""
    import uvloop

    results: dict[str, Any] = {}
    for seed, front in enumerate(fronts):
        with running(CONFIGS[front], name=f"bench-real-{front}") as stack:
            with stack.client() as client:
                urls = {pool.name: pool.replicas[0].url for pool in client.pools()}
            prefill_url, decode_url = urls["prefill"], urls["decode"]
            assert prefill_url and decode_url, urls

            def caller(side: str, gateway: str = stack.url, p: str = prefill_url, d: str = decode_url) -> Caller:
                return ThroughGateway(gateway) if side == "gateway" else ByHand(p, d)

            texts = prompts(plan.prompt_tokens, seed)
            for clients in plan.clients:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    samples = runner.run(measure(caller, plan, clients=clients, texts=texts))
                result = compare(samples)
                results.setdefault(front, {})[str(clients)] = result
                print(f"real engines, {front}, {clients}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fronts", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--clients", nargs="+", type=int, default=list(Plan.clients))
    parser.add_argument("--requests", type=int, default=Plan.requests, help="a side")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything started is ended
    plan = Plan(clients=tuple(args.clients), requests=args.requests)
    print(json.dumps({"plan": asdict(plan), "results": run(plan, args.fronts)}, indent=1))


if __name__ == "__main__":
    main()
