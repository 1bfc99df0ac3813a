# SPDX-License-Identifier: Apache-2.0
"""Line 2: prefixes that exceed an engine's KV space 2.5 times come back from host memory, faster than computed."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass

from benchmarks.real import Sample, ThroughGateway
from tests.prove.report import ROOT, Row
from tests.support.stack import Stack, running
from tests.support.tiers import prompts, reset_caches, tiers, total

CONFIG = ROOT / "configs" / "quickstart.yaml"
BLOCK = 128
BLOCKS = 96
PREFIX_TOKENS = 3600
NUM_PREFIXES = -(-BLOCKS * BLOCK * 5 // 2 // PREFIX_TOKENS)
"""So that the prefixes are at least 2.5 times the KV space of an engine."""
CPU_GIB = 0.25
"""Host memory of one engine: 131,072 tokens of the tiny model's 2 KiB each."""
SPEED_UP = 5.0
LONG_RANGE = (2.0, 22.0)


@dataclass(frozen=True)
class Measured:
    """Times to first token in seconds, and the bytes that host memory took and gave."""

    first: list[float]
    second: list[float]
    stored: float
    loaded: float


def overflow_pays() -> list[Row]:
    prefixes = prompts(NUM_PREFIXES, seed=32, shortest=PREFIX_TOKENS, longest=PREFIX_TOKENS)
    without = measure(prefixes, None)
    with_tier = measure(prefixes, CPU_GIB)
    space, size = BLOCKS * BLOCK, sum(len(p) for p in prefixes)
    plain, tier = (statistics.median(m.second) for m in (without, with_tier))
    ratio = plain / tier
    # Each prompt's own pair of figures: computed on the first pass, taken from host memory on the second.
    long_ratio = statistics.median(a / b for a, b in zip(with_tier.first, with_tier.second, strict=True))
    moved = f"{with_tier.stored / 2**20:.0f} MiB stored, {with_tier.loaded / 2**20:.0f} MiB loaded"
    return [
        Row(
            2,
            "prefixes against the KV space of an engine",
            f"{size} / {space} tokens = {size / space:.2f}",
            "at least 2.5",
            size >= 2.5 * space,
        ),
        Row(
            2,
            "2nd pass, TTFT p50 without / with host memory",
            f"{1e3 * plain:.0f} / {1e3 * tier:.0f} ms = {ratio:.1f}",
            f"at least {SPEED_UP:g}",
            ratio >= SPEED_UP,
        ),
        Row(
            2,
            "bytes between engine and host memory",
            moved,
            "more than 0 each way",
            with_tier.stored > 0 and with_tier.loaded > 0,
        ),
        Row(
            2,
            f"TTFT of {len(prefixes[0])} tokens computed / from host memory, p50 of pairs",
            f"{long_ratio:.1f}",
            "printed (published on H100: 2 to 22)",
            long_ratio > 0,
        ),
    ]


def measure(prefixes: list[list[int]], cpu_gib: float | None) -> Measured:
    """Two passes of the prefixes, one request at a time, on an application of its own."""
    change = tiers(cpu_gib=cpu_gib, blocks=BLOCKS)
    with running(CONFIG, name="prove-tiers-offload", change=change) as stack:
        # The first requests of a new application are slower: compile and connect before measuring.
        passes_of(stack, prompts(4, seed=33, shortest=PREFIX_TOKENS, longest=PREFIX_TOKENS))
        reset_caches(stack)
        first = passes_of(stack, prefixes)
        second = passes_of(stack, prefixes)
        stored = total(stack, "prefill", "vllm:kv_offload_store_bytes_total") if cpu_gib else 0.0
        loaded = total(stack, "prefill", "vllm:kv_offload_load_bytes_total") if cpu_gib else 0.0
    return Measured(first, second, stored, loaded)


def passes_of(stack: Stack, prefixes: list[list[int]]) -> list[float]:
    """Seconds to the first token of each prompt, one after the other."""

    async def run() -> list[float]:
        caller = ThroughGateway(stack.url)
        times = []
        try:
            for number, prefix in enumerate(prefixes):
                sample = Sample(number)
                body = {"model": "tiny", "prompt": prefix, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
                await caller.complete(sample, {**body, "stream": True})
                if sample.error:
                    raise RuntimeError(sample.error)
                times.append(sample.ttft_s)
        finally:
            caller.close()
        return times

    return asyncio.run(run())
