# SPDX-License-Identifier: Apache-2.0
"""Line 1: the tokens of one aggregated engine, over every combination of transport, host memory and sink."""

from __future__ import annotations

import itertools
import time

from tests.prove.report import ROOT, Row
from tests.support.answers import Answer, Case
from tests.support.stack import Stack, running
from tests.support.tiers import asked, books, case_of, orphan, prompts, reset_caches, steady, tiers, total, wrong

CONFIG = ROOT / "configs" / "quickstart.yaml"
NUM_PROMPTS = 20
BLOCKS = 96
"""12,288 tokens of KV an engine. The prompts together are about three times that, so they push each other out."""
SINKS: tuple[str, ...] = ("off", "write_through", "evicted", "unused")


def same_tokens() -> list[Row]:
    chosen, expected = steady([case_of(f"p{i}", p) for i, p in enumerate(prompts(32, seed=31))], NUM_PROMPTS)
    rows = [
        Row(1, "prompts with one answer on the reference engine", str(len(chosen)), f"{NUM_PROMPTS}", len(chosen) >= 20)
    ]
    for transport, offload, sink in itertools.product(("nixl", "mooncake"), (False, True), SINKS):
        rows += combination(transport, offload, sink, chosen, expected)
    return rows


def combination(transport: str, offload: bool, sink: str, chosen: list[Case], expected: list[Answer]) -> list[Row]:
    """Two passes over one application, and where the second found its prompts."""
    name = f"{transport}, offload {'on' if offload else 'off'}, sink {sink}"
    change = tiers(transport=transport, cpu_gib=0.25 if offload else None, sink=sink, l1_gib=0.25, blocks=BLOCKS)
    started = time.monotonic()
    with running(CONFIG, name="prove-tiers-tokens", change=change, timeout_s=300) as stack:
        problems = wrong(expected, asked(stack.url, chosen))
        if sink == "unused":
            # What was consumed is not stored. So the same prompts are prefilled for nobody.
            orphan(stack, [case.body["prompt"] for case in chosen], transport)
        if sink != "evicted":
            # There the engine has to be left to push blocks out by itself; a reset would only drop them.
            reset_caches(stack)
        before = found_in(stack)
        again = wrong(expected, asked(stack.url, chosen))
        after = found_in(stack)
        totals = books(stack)
    served = {tier: int(after[tier] - before[tier]) for tier in after if after[tier] > before[tier]}
    has_tier = offload or sink in ("write_through", "evicted", "unused")
    for problem in problems + again:
        print(f"    {name}: {problem[:300]}")
    print(f"    {name}: {time.monotonic() - started:.0f} s, books {totals}", flush=True)
    return [
        Row(
            1,
            f"{name}: wrong answers, 1st and 2nd pass",
            f"{len(problems)} and {len(again)}",
            "0 and 0",
            not problems and not again,
        ),
        Row(
            1,
            f"{name}: 2nd pass, prompt tokens from",
            ", ".join(f"{k} {v}" for k, v in served.items()) or "no tier",
            "a tier" if has_tier else "no tier is there",
            bool(served) == has_tier,
        ),
    ]


def found_in(stack: Stack) -> dict[str, float]:
    """Prompt tokens that the prefill engines took from each tier, by vLLM's own counter."""
    name = "vllm:prompt_tokens_cached_by_source_total"
    return {
        "host memory": total(stack, "prefill", name, 'source="host"'),
        "LMCache": total(stack, "prefill", name, 'source="external_unspecified"'),
    }
