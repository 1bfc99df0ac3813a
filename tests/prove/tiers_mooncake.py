# SPDX-License-Identifier: Apache-2.0
"""Line 7: Mooncake under requests that end at their first token, and its first tokens against NIXL's."""

from __future__ import annotations

import asyncio
import random
import statistics
import time

import httpx

from tests.prove.report import ROOT, Row
from tests.prove.tiers_offload import passes_of
from tests.support.answers import Case, ask
from tests.support.stack import running
from tests.support.tiers import balanced, case_of, prompts, settled_books, tiers

CONFIG = ROOT / "configs" / "quickstart.yaml"
NUM_REQUESTS = 100
CLIENTS = 4
SLACK_S = 1.0
"""What scheduling on a busy two-core machine adds to one request or another. vLLM's own wait would be 480 s."""
EOS = 1


def first_tokens() -> list[Row]:
    chosen = requests(NUM_REQUESTS)
    sample = prompts(30, seed=71, shortest=600, longest=600)
    warm = prompts(5, seed=72, shortest=600, longest=600)
    with running(CONFIG, name="prove-tiers-mooncake", change=tiers(transport="mooncake")) as stack:
        passes_of(stack, warm)
        times = timed(stack.url, chosen)
        totals = settled_books(stack)
        mooncake = statistics.median(passes_of(stack, sample))
        failed = sum(s["num_requests_waiting"] for pool in stack.stats().values() for s in pool)
    with running(CONFIG, name="prove-tiers-nixl", change=tiers(transport="nixl")) as stack:
        passes_of(stack, warm)
        nixl = statistics.median(passes_of(stack, sample))
    early, ordinary, limit = in_time(chosen, times)
    figure = f"{1e3 * mooncake:.1f} / {1e3 * nixl:.1f} ms = {mooncake / nixl:.2f}"
    return [
        Row(7, "requests that end at their first token", f"{len(early)} of {len(chosen)}", "some", len(early) >= 20),
        Row(
            7,
            "longest of them / of the others",
            f"{max(early):.2f} / {max(ordinary):.2f} s",
            f"at most {limit:.2f} s",
            max(early) <= limit,
        ),
        Row(7, "requests left waiting", str(failed), "0", failed == 0),
        Row(
            7,
            "the books balance",
            ", ".join(f"{k} {v}" for k, v in totals.items() if v),
            "produced = sum of ends",
            balanced(totals),
        ),
        Row(7, "TTFT p50 of 600 tokens, Mooncake / NIXL", figure, "printed", mooncake > 0),
    ]


def requests(number: int) -> list[Case]:
    """Three in ten end at their first token: by the end of the sequence, by a stop token, or by their own length."""
    chooser = random.Random(7)
    found = []
    for i, prompt in enumerate(prompts(number, seed=73, longest=1500)):
        kind = chooser.choice(("ordinary",) * 7 + ("eos", "stop", "length"))
        if kind == "ordinary":
            found.append(case_of(kind, prompt, max_tokens=24))
        elif kind == "length":
            found.append(case_of(kind, prompt, max_tokens=1))
        else:
            token = EOS if kind == "eos" else 500 + i
            forced = {"logit_bias": {str(token): 100.0}, "ignore_eos": False}
            more = {"stop_token_ids": [token]} if kind == "stop" else {}
            found.append(case_of(kind, prompt, max_tokens=24, **forced, **more))
    return found


def in_time(chosen: list[Case], times: list[float]) -> tuple[list[float], list[float], float]:
    """Seconds of those that end at their first token, of the others, and what the former may take at most."""
    early = [took for case, took in zip(chosen, times, strict=True) if case.name != "ordinary"]
    ordinary = [took for case, took in zip(chosen, times, strict=True) if case.name == "ordinary"]
    return early, ordinary, max(ordinary) + SLACK_S


def timed(url: str, chosen: list[Case]) -> list[float]:
    """Seconds of each request. Raises when one fails, or does not end where it should."""
    return asyncio.run(_timed(url, chosen))


async def _timed(url: str, chosen: list[Case]) -> list[float]:
    times = [0.0] * len(chosen)
    todo = iter(range(len(chosen)))

    async def work(client: httpx.AsyncClient) -> None:
        for i in todo:
            started = time.monotonic()
            answer = await ask(client, url, chosen[i])
            times[i] = time.monotonic() - started
            if answer.status != 200 or answer.error:
                raise RuntimeError(f"{chosen[i].name}: {answer.status} {answer.error}")
            num_tokens = len(answer.choices[0]["token_ids"])
            if (num_tokens == 1) != (chosen[i].name != "ordinary"):
                raise RuntimeError(f"{chosen[i].name} ended after {num_tokens} tokens")

    async with httpx.AsyncClient(timeout=600) as client:
        await asyncio.gather(*(work(client) for _ in range(CLIENTS)))
    return times
