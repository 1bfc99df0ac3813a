# SPDX-License-Identifier: Apache-2.0
"""Line 4: what each sink costs a load that needs none. Four applications side by side get the same load, in turn."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.real import Sample, ThroughGateway
from tests.prove.report import ROOT, Row
from tests.support.stack import running
from tests.support.tiers import tiers

CONFIG = ROOT / "configs" / "quickstart.yaml"
SINKS = ("off", "unused", "write_through", "evicted")
ROUNDS = 250
"""Requests to each application, in rounds of one to each: the machine's own speed drifts by more than the bounds within
a minute, so only neighbours are compared."""
WARM_UP = 8
PROMPT_TOKENS = 600
MAX_TOKENS = 32
THROUGHPUT = 0.98
TTFT = 1.03


@dataclass
class Times:
    """Seconds of each request to one application."""

    first: list[float] = field(default_factory=list)
    """To the first token."""
    whole: list[float] = field(default_factory=list)
    """To the end."""


def hot_path() -> list[Row]:
    with contextlib.ExitStack() as all_of_them:
        urls = {}
        for sink in SINKS:
            change = tiers(sink=sink, l1_gib=0.25, blocks=200)
            stack = running(CONFIG, name=f"prove-tiers-hot-{sink}", change=change, timeout_s=400)
            urls[sink] = all_of_them.enter_context(stack).url
        time.sleep(5)
        chooser = random.Random(41)
        asyncio.run(_in_turn(urls, WARM_UP, chooser))
        # Two halves: the same comparison twice says how far it can be trusted.
        halves = [asyncio.run(_in_turn(urls, ROUNDS // 2, chooser)) for _ in range(2)]
    both = {s: Times(halves[0][s].first + halves[1][s].first, halves[0][s].whole + halves[1][s].whole) for s in SINKS}
    rows = []
    for sink in SINKS[1:]:
        throughput, ttft = ratios(both, sink)
        parts = " and ".join("{:.3f}, {:.3f}".format(*ratios(half, sink)) for half in halves)
        print(f"    {sink} / off: throughput and TTFT p50 of the two halves {parts}", flush=True)
        if sink == "unused":
            figure = f"{throughput:.3f}"
            rows.append(
                Row(4, "throughput, sink unused / off", figure, f"at least {THROUGHPUT}", throughput >= THROUGHPUT)
            )
            rows.append(Row(4, "TTFT p50, sink unused / off", f"{ttft:.3f}", f"at most {TTFT}", ttft <= TTFT))
        else:
            what = f"sink {sink} / off: throughput, TTFT p50"
            rows.append(Row(4, what, f"{throughput:.3f}, {ttft:.3f}", "printed", throughput > 0))
    p50 = {sink: statistics.median(times.first) for sink, times in both.items()}
    print("    TTFT p50: " + ", ".join(f"{sink} {1e3 * value:.1f} ms" for sink, value in p50.items()))
    return rows


def ratios(times: Mapping[str, Times], sink: str) -> tuple[float, float]:
    """Throughput and TTFT p50 with `sink` over those with `off`."""
    off, other = times["off"], times[sink]
    return sum(off.whole) / sum(other.whole), statistics.median(other.first) / statistics.median(off.first)


async def _in_turn(urls: Mapping[str, str], rounds: int, chooser: random.Random) -> dict[str, Times]:
    """Fresh prompts, one request at a time, each round in another order."""
    times = {sink: Times() for sink in urls}
    callers = {sink: ThroughGateway(url) for sink, url in urls.items()}
    try:
        for number in range(rounds):
            for sink in chooser.sample(list(urls), len(urls)):
                sample = Sample(number)
                prompt = [chooser.randrange(20, 1500) for _ in range(PROMPT_TOKENS)]
                body = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True}
                started = time.perf_counter()
                await callers[sink].complete(sample, {**body, "temperature": 0, "stream": True})
                if sample.error:
                    raise RuntimeError(sample.error)
                times[sink].first.append(sample.ttft_s)
                times[sink].whole.append(time.perf_counter() - started)
    finally:
        for caller in callers.values():
            caller.close()
    return times
