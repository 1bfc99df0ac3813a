# SPDX-License-Identifier: Apache-2.0
"""Line 8: with files behind LMCache, a second life of the whole application serves the prompts of the first."""

from __future__ import annotations

import time

from tests.prove.report import ROOT, Row
from tests.support.answers import Answer
from tests.support.stack import Stack, running
from tests.support.tiers import asked, case_of, events, fresh_dir, full_chunks, prompts, replica_urls, tiers, wrong

CONFIG = ROOT / "configs" / "quickstart.yaml"
NUM_PROMPTS = 20
SHARE = 0.95


def durable(num_prompts: int = NUM_PROMPTS) -> list[Row]:
    chosen = prompts(num_prompts, seed=81, shortest=512, longest=2048)
    cases = [case_of(f"p{i}", p) for i, p in enumerate(chosen)]
    change = tiers(sink="write_through", l1_gib=0.25, l2=[{"type": "fs", "path": fresh_dir("prove-tiers-l2")}])
    with running(CONFIG, name="prove-tiers-first-life", change=change) as stack:
        expected = asked(stack.url, cases)
        time.sleep(5)  # files are written behind the server's memory
        code, _ = stack.stop()
    with running(CONFIG, name="prove-tiers-second-life", change=change) as stack:
        got: list[Answer] = asked(stack.url, cases)
        loaded = _loaded(stack)
    wanted = sum(full_chunks(p) for p in chosen)
    problems = wrong(expected, got)
    for problem in problems:
        print(f"    {problem[:300]}")
    return [
        Row(8, "first life ended, exit code", str(code), "0", code == 0),
        Row(
            8,
            "second life: prompt tokens in full chunks from LMCache",
            f"{loaded} of {wanted}, {100 * loaded / wanted:.1f} %",
            f"at least {100 * SHARE:g} %",
            loaded >= SHARE * wanted,
        ),
        Row(8, "answers that differ from the first life's", f"{len(problems)} of {len(cases)}", "0", not problems),
    ]


def _loaded(stack: Stack) -> int:
    """Prompt tokens that the prefill engine has loaded from LMCache, which began its life empty."""
    [url] = replica_urls(stack, "prefill")
    return sum(e["tokens"] for e in events(url) if e["kind"] == "loaded" and e["source"] == "lmcache")
