# SPDX-License-Identifier: Apache-2.0
"""Line 3: the answers of one aggregated engine, and the proof that the prompts were prefilled elsewhere."""

from __future__ import annotations

import asyncio
from collections import Counter

from tests.prove.report import ROOT, Row
from tests.support.answers import Answer, Case, ask_all, cases, difference
from tests.support.stack import aggregated_engine, running

CONFIG = ROOT / "configs" / "quickstart.yaml"


PASSES = (1, 16)


def reference(
    chosen: list[Case], passes: tuple[int, ...] = PASSES, engine_kwargs: dict[str, object] | None = None
) -> list[list[Answer]]:
    """The aggregated engine's answers, in as many passes with as many clients as the application is asked in.

    Pass by pass, because the second finds the prompts in the prefix cache, and for a prompt near a tie the last bits of
    a cached prefix can decide a token (on one engine as on two).
    """
    with aggregated_engine(engine_kwargs=engine_kwargs) as url:
        return [asyncio.run(ask_all(url, chosen, num_clients=n)) for n in passes]


def wrong(chosen: list[Case], expected: list[Answer], got: list[Answer]) -> list[str]:
    """Name and difference of each answer that is not the expected one."""
    found = []
    for case, one, other in zip(chosen, expected, got, strict=True):
        if (problem := difference(one, other)) is not None:
            found.append(f"{case.name}: {problem}")
    return found


def same_tokens() -> list[Row]:
    chosen = cases()
    expected = reference(chosen)
    refused = [case.name for case, answer in zip(chosen, expected[0], strict=True) if answer.error]
    with running(CONFIG, name="prove-tokens") as stack:
        before = stack.stats()
        rows = []
        for num_clients, right in zip(PASSES, expected, strict=True):
            got = asyncio.run(ask_all(stack.url, chosen, num_clients=num_clients))
            problems = wrong(chosen, right, got)
            for problem in problems:
                print(f"    {problem[:300]}")
            rows.append(
                Row(
                    3,
                    f"answers equal to the aggregated engine's, {num_clients} at once",
                    f"{len(chosen) - len(problems)} of {len(chosen)}",
                    "all, of at least 150",
                    not problems and len(chosen) >= 150,
                )
            )
        modes = Counter(mode_of(answer) for answer in got)
        after = stack.stats()
        num_bytes = stack.engine_metric("decode", "vllm:nixl_bytes_transferred_sum")
    handed = [c for c, a in zip(chosen, got, strict=True) if mode_of(a) == "prefill pool"]
    rows.append(Row(3, "requests that the reference engine refuses", str(len(refused)), "0", not refused))
    rows.append(
        Row(
            3,
            "requests whose prompt the prefill pool computed",
            f"{len(handed)} of {len(chosen)}",
            "at least 150",
            len(handed) >= 150,
        )
    )
    rows.append(
        Row(3, "vllm:nixl_bytes_transferred on decode", f"{num_bytes / 2**20:.1f} MiB", "more than 0", num_bytes > 0)
    )
    computed = {
        pool: sum(s["prompt_tokens_computed_total"] for s in after[pool])
        - sum(s["prompt_tokens_computed_total"] for s in before[pool])
        for pool in after
    }
    rows.append(
        Row(
            3,
            "prompt tokens computed: prefill pool / decode pool",
            f"{computed['prefill']} / {computed['decode']}",
            "decode at most 10 % of prefill",
            computed["decode"] <= 0.1 * computed["prefill"],
        )
    )
    print(f"    by prefill: {dict(modes)}")
    return rows


def mode_of(answer: Answer) -> str:
    return "decode engine" if answer.headers.get("x-disagg-prefill") == "local" else "prefill pool"
