# SPDX-License-Identifier: Apache-2.0
"""Line 6: three hundred clients that leave at random moments, with every tier on, over both transports."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from tests.prove.report import ROOT, Row
from tests.prove.serve_leaving import COUNTED, LEFT, first_text_s, idle_after, num_left, phases_at_the_gateway, wave
from tests.support.answers import difference
from tests.support.stack import Stack, running
from tests.support.tiers import asked, balanced, case_of, prompts, settled_books, tiers

CONFIG = ROOT / "configs" / "quickstart.yaml"
NUM_CLIENTS = 300
AT_ONCE = 6
IDLE_S = 60.0
"""Well beyond a lease: what is not released by then never is."""


def abort_storm() -> list[Row]:
    rows = []
    for transport in ("nixl", "mooncake"):
        change = tiers(transport=transport, cpu_gib=0.25, sink="unused", l1_gib=0.25, blocks=200)
        with running(CONFIG, name=f"prove-tiers-storm-{transport}", change=change) as stack:
            rows += storm(stack, transport, NUM_CLIENTS)
    return rows


def storm(stack: Stack, transport: str, num_clients: int) -> list[Row]:
    chooser = random.Random(6)
    healthy = [case_of("healthy", prompts(1, seed=61, shortest=700)[0])]
    [first] = asked(stack.url, healthy)
    unit_s = first_text_s(stack.url)
    kept = idle_after(stack, IDLE_S)
    produced = settled_books(stack)["produced"]
    engines = {s["incarnation"] for pool in stack.stats().values() for s in pool}
    before = phases_at_the_gateway(stack)
    seen: Counter[str] = Counter()
    for start in range(0, num_clients, AT_ONCE):
        clients = [(start + i, unit_s * chooser.choice((0.4, 2, 4, 12)) * chooser.random()) for i in range(AT_ONCE)]
        seen.update(asyncio.run(wave(stack.url, clients, chooser)))
    idle = idle_after(stack, IDLE_S)
    totals = settled_books(stack)
    [last] = asked(stack.url, healthy)
    same = {s["incarnation"] for pool in stack.stats().values() for s in pool} == engines
    phases = phases_at_the_gateway(stack) - before
    left, counted = num_left(seen), sum(phases.values())
    print(f"    {transport}: clients had {dict(seen)}, legs {dict(phases)}, books {totals}")
    return [
        Row(
            6,
            f"{transport}: clients that left before their answer's end, as the gateway counts, phases seen",
            f"{left}, {counted}, {len(phases)}",
            f"at least {LEFT * num_clients:g}, {COUNTED * num_clients:g} of {num_clients}, at least 2",
            # A few clients may all leave in one phase.
            left >= LEFT * num_clients
            and counted >= COUNTED * num_clients
            and (len(phases) >= 2 or num_clients < NUM_CLIENTS),
        ),
        Row(
            6,
            f"{transport}: both engines live on, same answer",
            "yes" if same else "no",
            "yes",
            same and difference(first, last) is None,
        ),
        Row(
            6,
            f"{transport}: no engine holds KV before, and after",
            f"{kept:.1f} s, {idle:.1f} s",
            f"{IDLE_S:g} s each",
            max(kept, idle) <= IDLE_S,
        ),
        Row(
            6,
            f"{transport}: the books balance",
            ", ".join(f"{k} {v}" for k, v in totals.items() if v),
            "produced = sum of ends",
            balanced(totals) and totals["produced"] > produced,
        ),
    ]
