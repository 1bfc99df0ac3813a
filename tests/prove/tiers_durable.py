# SPDX-License-Identifier: Apache-2.0
"""Line 8: with storage behind LMCache, a second life of the whole application serves the prompts of the first."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.prove.report import ROOT, Row
from tests.support.answers import Answer, Case
from tests.support.redis import PASSWORD, redis_server
from tests.support.stack import Stack, running
from tests.support.tiers import (
    asked,
    case_of,
    events,
    fresh_dir,
    full_chunks,
    prompts,
    replica_urls,
    steady,
    tiers,
    wrong,
)

CONFIG = ROOT / "configs" / "quickstart.yaml"
NUM_PROMPTS = 20
SHARE = 0.95
PASSWORD_ENV = "DISAGG_TEST_REDIS_PASSWORD"


def durable(num_prompts: int = NUM_PROMPTS) -> list[Row]:
    chosen, expected = reference(num_prompts)
    rows = two_lives("fs", *lives({"type": "fs", "path": fresh_dir("prove-tiers-l2")}), chosen, expected)
    with redis_server(Path(fresh_dir("prove-tiers-redis"))) as port:
        os.environ[PASSWORD_ENV] = PASSWORD
        redis = {"type": "resp", "host": "127.0.0.1", "port": port, "password_env": PASSWORD_ENV}
        rows += two_lives("Redis", *lives(redis), chosen, expected)
    return rows


def reference(num_prompts: int) -> tuple[list[Case], list[Answer]]:
    """Prompts, and an aggregated engine's answers."""
    candidates = prompts(num_prompts + num_prompts // 2, seed=81, shortest=512, longest=2048)
    chosen, expected = steady([case_of(f"p{i}", p) for i, p in enumerate(candidates)], num_prompts)
    assert len(chosen) == num_prompts
    return chosen, expected


def lives(l2: dict[str, Any]) -> tuple[AbstractContextManager[Stack], AbstractContextManager[Stack]]:
    """The same application twice, with this storage behind LMCache."""
    change = tiers(sink="write_through", l1_gib=0.25, l2=[l2])
    first, second = (running(CONFIG, name=f"prove-tiers-{which}-life", change=change) for which in ("first", "second"))
    return first, second


def two_lives(
    name: str,
    first: AbstractContextManager[Stack],
    second: AbstractContextManager[Stack],
    chosen: list[Case],
    expected: list[Answer],
) -> list[Row]:
    """Start, ask, end with Ctrl-C; start again, ask the same."""
    with first as stack:
        problems = wrong(expected, asked(stack.url, chosen))
        time.sleep(5)  # the server writes its storage behind its memory
        code, _ = stack.stop()
    with second as stack:
        problems += wrong(expected, asked(stack.url, chosen))
        loaded = from_lmcache(stack)
    wanted = sum(full_chunks(case.body["prompt"]) for case in chosen)
    for problem in problems:
        print(f"    {problem[:300]}")
    share = f"{loaded} of {wanted}, {100 * loaded / wanted:.1f} %"
    return [
        Row(8, f"{name}: first life ended, exit code", str(code), "0", code == 0),
        Row(
            8,
            f"{name}: second life, prompt tokens in full chunks from LMCache",
            share,
            f"at least {100 * SHARE:g} %",
            loaded >= SHARE * wanted,
        ),
        Row(8, f"{name}: wrong answers in both lives", f"{len(problems)} of {2 * len(chosen)}", "0", not problems),
    ]


def from_lmcache(stack: Stack) -> int:
    """Prompt tokens that the prefill engine has loaded from LMCache, which began its life empty."""
    [url] = replica_urls(stack, "prefill")
    return sum(e["tokens"] for e in events(url) if e["kind"] == "loaded" and e["source"] == "lmcache")
