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
from tests.prove.tiers_rescue import leave as leave_unread
from tests.prove.tiers_rescue import stored_bytes
from tests.support.answers import ask_all, cases
from tests.support.stack import running
from tests.support.tiers import (
    WHOLE_PROMPTS,
    asked,
    balanced,
    case_of,
    events,
    full_chunks,
    orphan,
    prompts,
    replica_urls,
    reset_caches,
    settled_books,
    tiers,
)

CONFIG = ROOT / "configs" / "quickstart.yaml"
NUM_REQUESTS = 100
NUM_CLIENTS = 100
LEASE_S = 10
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
    return [*push_and_pull(), *unread(), *touched()]


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


def unread(each: int = 20, num_consumed: int = 100) -> list[Row]:
    """KV that no decode engine took, of clients that left and of leases that ran out, and what becomes of it.

    A decode engine that hangs is no case of its own here: both legs are under way by then, and the gateway ends a
    prefill leg whose decode replica it has taken out.
    """
    # One sequence at a time on decode: what comes after the first waits in the engine's queue, prefilled and unread.
    change = tiers(mode="push", sink="unused", lease_s=LEASE_S, l1_gib=1.0, decode_kwargs={"max_num_seqs": 1})
    lost = prompts(2 * each, seed=43, shortest=512, longest=2048)
    with running(CONFIG, name="prove-push-unread", change=change) as stack:
        before = stored_bytes(stack)
        taken = prompts(num_consumed, seed=44, longest=600)
        asked(stack.url, [case_of(f"c{i}", p, max_tokens=2) for i, p in enumerate(taken)], 4)
        consumed = settled_books(stack)["consumed"]
        grown = stored_bytes(stack) - before
        leave_unread(stack, lost[:each])
        totals = settled_books(stack)
        ids = set(orphan(stack, lost[each:], settle=False))
        [url] = replica_urls(stack, "prefill")
        told = events(url)
        expired = sum(e["kind"] == "ended" and e["outcome"] == "expired" and e["id"] in ids for e in told)
        reset_caches(stack)
        passes_of(stack, lost)
        loads = [e for e in events(url)[len(told) :] if e["kind"] == "loaded" and e["source"] == "lmcache"]
    loaded, wanted = sum(e["tokens"] for e in loads), sum(full_chunks(p) for p in lost)
    share = loaded / wanted
    return [
        Row(4, "push: consumed, by the ledger", str(consumed), f"at least {num_consumed}", consumed >= num_consumed),
        Row(4, "push: bytes of them stored in LMCache", f"{grown:.0f}", "0", grown == 0),
        Row(4, "push: clients left, rescued", str(totals["rescued"]), str(each), totals["rescued"] == each),
        Row(4, "push: the books balance then", _said(totals), "produced = sum of ends", balanced(totals)),
        Row(4, "push: leases that ran out, all of them stored", str(expired), str(each), expired == each),
        Row(
            4,
            "push: their full chunks that came from LMCache",
            f"{loaded} of {wanted} = {100 * share:.1f} %",
            "at least 95 %",
            share >= 0.95,
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
