# SPDX-License-Identifier: Apache-2.0
"""Line 4: NIXL push keeps what pull keeps, its first tokens beside pull's, and how little its addition touched."""

from __future__ import annotations

import asyncio
import statistics
import subprocess

from tests.prove.report import ROOT, Row
from tests.prove.serve_leaving import leave
from tests.prove.serve_tokens import mode_of, reference, wrong
from tests.prove.tiers_offload import passes_of
from tests.prove.tiers_rescue import nothing_is_wasted
from tests.support.answers import ask_all, cases
from tests.support.stack import running
from tests.support.tiers import WHOLE_PROMPTS, balanced, prompts, settled_books, tiers

CONFIG = ROOT / "configs" / "quickstart.yaml"
NUM_REQUESTS = 100
NUM_CLIENTS = 100
SAMPLE = 40
SUBJECT = "NIXL push: the prefill engine writes"
"""Of the commit that added it."""
OWN = (
    "transport/nixl_push/",
    "transport/in_engine/nixl_push/",
    "transport/config.py",
    "tests/",
    "docs/",
    "configs/",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
)
"""Its own folders, the config union, tests and documents."""
MOST_OTHERS = 3


def line4() -> list[Row]:
    return [*push_and_pull(), *nothing_is_wasted(line=4, mode="push"), *touched()]


def push_and_pull() -> list[Row]:
    """Answers, clients that leave, the books and first tokens of push, and first tokens of pull."""
    chosen = cases()[:NUM_REQUESTS]
    [expected] = reference(chosen, passes=(1,), engine_kwargs=dict(WHOLE_PROMPTS))
    sample = prompts(SAMPLE, seed=41, shortest=600, longest=600)
    warm = prompts(5, seed=42, shortest=600, longest=600)
    with running(CONFIG, name="prove-push", change=tiers(mode="push")) as stack:
        got = asyncio.run(ask_all(stack.url, chosen, num_clients=1))
        passes_of(stack, warm)
        push = statistics.median(passes_of(stack, sample))
        totals = settled_books(stack)
        left = leave(stack, NUM_CLIENTS, line=4)
        after = settled_books(stack)
        late = sum(s["num_notifications_after_expiry_total"] for pool in stack.stats().values() for s in pool)
    with running(CONFIG, name="prove-pull", change=tiers(mode="pull")) as stack:
        passes_of(stack, warm)
        pull = statistics.median(passes_of(stack, sample))
    problems = wrong(chosen, expected, got)
    for problem in problems:
        print(f"    {problem[:300]}")
    handed = sum(mode_of(answer) == "prefill pool" for answer in got)
    return [
        Row(
            4,
            "push: answers equal to the aggregated engine's",
            f"{len(chosen) - len(problems)} of {len(chosen)}",
            f"all of {NUM_REQUESTS}",
            not problems and len(chosen) == NUM_REQUESTS,
        ),
        Row(
            4, "push: prompts that the prefill pool computed", f"{handed} of {len(chosen)}", "at least 90", handed >= 90
        ),
        Row(4, "push: the books balance", _said(totals), "produced = sum of ends", balanced(totals)),
        *left,
        Row(4, "push: the books after the clients that left", _said(after), "produced = sum of ends", balanced(after)),
        Row(4, "push: writes into blocks that were given away", str(late), "0", late == 0),
        Row(
            4,
            "TTFT p50 of 600 tokens, push / pull",
            f"{1e3 * push:.1f} / {1e3 * pull:.1f} ms = {push / pull:.2f}",
            "printed",
            push > 0,
        ),
    ]


def _said(totals: dict[str, int]) -> str:
    return ", ".join(f"{k} {v}" for k, v in totals.items() if v)


def touched() -> list[Row]:
    """The files that the addition touched outside its own folders, the config union, tests and documents."""
    commit = _git("log", "--format=%H", "--fixed-strings", f"--grep={SUBJECT}", "-1")
    files = _git("show", "--format=", "--name-only", commit).split() if commit else []
    others = [file for file in files if not file.startswith(OWN)]
    for file in files:
        print(f"    {file}{'  <- outside' if file in others else ''}")
    figure = ", ".join(others) or "none"
    holds = bool(files) and len(others) <= MOST_OTHERS
    return [Row(4, f"files touched outside, of {len(files)}", figure, f"at most {MOST_OTHERS}", holds)]


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
