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
TURNS = 20
"""Turns of each application that are judged. Many short ones, because the machine's own speed drifts by more than the
bounds within a minute."""
PRINTED_TURNS = 4
REQUESTS = 32
CLIENTS = 4
PROMPT_TOKENS = 600
MAX_TOKENS = 32
THROUGHPUT = 0.98
TTFT = 1.03


def hot_path() -> list[Row]:
    throughput, ttft = against("off", "unused", TURNS)
    rows = [
        Row(
            4, "throughput, sink unused / off", f"{throughput:.3f}", f"at least {THROUGHPUT}", throughput >= THROUGHPUT
        ),
        Row(4, "TTFT p50, sink unused / off", f"{ttft:.3f}", f"at most {TTFT}", ttft <= TTFT),
    ]
    for one, other in ((None, "unused"), ("off", "write_through"), ("off", "evicted")):
        throughput, ttft = against(one, other, PRINTED_TURNS)
        what = f"sink {other} / {one or 'no shared tier'}: throughput, TTFT p50"
        rows.append(Row(4, what, f"{throughput:.3f}, {ttft:.3f}", "printed", throughput > 0))
    return rows


def against(one: str | None, other: str | None, turns: int) -> tuple[float, float]:
    """Throughput and TTFT p50 of the second setting over those of the first, medians of turns."""

    chooser = random.Random(41)
    rates: tuple[list[float], list[float]] = ([], [])
    firsts: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as both:
        urls = [
            both.enter_context(running(CONFIG, name=f"prove-tiers-hot-{name}", change=_change(sink), timeout_s=400)).url
            for name, sink in (("one", one), ("other", other))
        ]
        time.sleep(5)
        for turn in range(turns + 1):
            for side in (0, 1) if turn % 2 else (1, 0):
                rate, ttft = asyncio.run(_turn(urls[side], chooser))
                if turn:  # the first turn is the warm-up
                    rates[side].append(rate)
                    firsts[side].append(ttft)
    throughput = statistics.median(b / a for a, b in zip(*rates, strict=True))
    ttft = statistics.median(b / a for a, b in zip(*firsts, strict=True))
    print(f"    TTFT ratios of the turns: {' '.join(f'{b / a:.2f}' for a, b in zip(*firsts, strict=True))}")
    print(
        f"    {one or 'none'} against {other}: requests/s {statistics.median(rates[0]):.2f} and "
        f"{statistics.median(rates[1]):.2f}, TTFT p50 {1e3 * statistics.median(firsts[0]):.1f} and "
        f"{1e3 * statistics.median(firsts[1]):.1f} ms; ratios {throughput:.3f}, {ttft:.3f}",
        flush=True,
    )
    return throughput, ttft


def _change(sink: str | None) -> Change:
    return tiers(sink=sink, l1_gib=0.5, blocks=200)


async def _turn(url: str, chooser: random.Random) -> tuple[float, float]:
    """Requests a second, and the median time to first token in seconds, of one turn of fresh prompts."""
    todo = [[chooser.randrange(20, 1500) for _ in range(PROMPT_TOKENS)] for _ in range(REQUESTS)]
    samples: list[Sample] = []
    waiting = iter(todo)

    async def work() -> None:
        caller = ThroughGateway(url)
        try:
            for prompt in waiting:
                sample = Sample(len(samples))
                samples.append(sample)
                body = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True}
                await caller.complete(sample, {**body, "temperature": 0, "stream": True})
                if sample.error:
                    raise RuntimeError(sample.error)
        finally:
            caller.close()

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return REQUESTS / (time.perf_counter() - started), statistics.median(s.ttft_s for s in samples)
