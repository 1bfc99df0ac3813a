# SPDX-License-Identifier: Apache-2.0
"""Line 4: what a sink costs a load that needs none. Two applications side by side take turns under the same load."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time

from benchmarks.real import Sample, ThroughGateway
from tests.prove.report import ROOT, Row
from tests.support.stack import running
from tests.support.tiers import Change, tiers

CONFIG = ROOT / "configs" / "quickstart.yaml"
REQUESTS = 400
"""Requests to each application, one to the one, one to the other: the machine's own speed drifts by more than the
bounds within a minute, so only neighbours are compared."""
PRINTED_REQUESTS = 120
PROMPT_TOKENS = 600
MAX_TOKENS = 32
THROUGHPUT = 0.98
TTFT = 1.03


def hot_path() -> list[Row]:
    throughput, ttft = against("off", "unused", REQUESTS)
    rows = [
        Row(
            4, "throughput, sink unused / off", f"{throughput:.3f}", f"at least {THROUGHPUT}", throughput >= THROUGHPUT
        ),
        Row(4, "TTFT p50, sink unused / off", f"{ttft:.3f}", f"at most {TTFT}", ttft <= TTFT),
    ]
    # The first says how well two equal applications are told apart.
    for one, other in (("off", "off"), (None, "unused"), ("off", "write_through"), ("off", "evicted")):
        throughput, ttft = against(one, other, PRINTED_REQUESTS)
        what = f"sink {other} / {one or 'no shared tier'}: throughput, TTFT p50"
        rows.append(Row(4, what, f"{throughput:.3f}, {ttft:.3f}", "printed", throughput > 0))
    return rows


def against(one: str | None, other: str | None, num_requests: int) -> tuple[float, float]:
    """Throughput and TTFT p50 of the second setting over those of the first."""
    chooser = random.Random(41)
    with contextlib.ExitStack() as both:
        urls = [
            both.enter_context(running(CONFIG, name=f"prove-tiers-hot-{name}", change=_change(sink), timeout_s=400)).url
            for name, sink in (("one", one), ("other", other))
        ]
        time.sleep(5)
        asyncio.run(_in_turn(urls, 10, chooser))  # the first requests connect and compile
        firsts, totals = asyncio.run(_in_turn(urls, num_requests, chooser))
    throughput = sum(totals[0]) / sum(totals[1])
    ttft = statistics.median(firsts[1]) / statistics.median(firsts[0])
    print(
        f"    {one or 'none'} against {other}: TTFT p50 {1e3 * statistics.median(firsts[0]):.1f} and "
        f"{1e3 * statistics.median(firsts[1]):.1f} ms, requests/s {num_requests / sum(totals[0]):.2f} and "
        f"{num_requests / sum(totals[1]):.2f}; ratios {ttft:.3f}, {throughput:.3f}",
        flush=True,
    )
    return throughput, ttft


def _change(sink: str | None) -> Change:
    return tiers(sink=sink, l1_gib=0.5, blocks=200)


async def _in_turn(
    urls: list[str], num_requests: int, chooser: random.Random
) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]]:
    """Seconds to the first token, and in all, of fresh prompts; each application comes first every other time."""
    firsts: tuple[list[float], list[float]] = ([], [])
    totals: tuple[list[float], list[float]] = ([], [])
    callers = [ThroughGateway(url) for url in urls]
    try:
        for number in range(num_requests):
            for side in (0, 1) if number % 2 else (1, 0):
                sample = Sample(number)
                prompt = [chooser.randrange(20, 1500) for _ in range(PROMPT_TOKENS)]
                body = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True}
                started = time.perf_counter()
                await callers[side].complete(sample, {**body, "temperature": 0, "stream": True})
                if sample.error:
                    raise RuntimeError(sample.error)
                firsts[side].append(sample.ttft_s)
                totals[side].append(time.perf_counter() - started)
    finally:
        for caller in callers:
            caller.close()
    return firsts, totals
