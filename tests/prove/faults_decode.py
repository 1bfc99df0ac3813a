# SPDX-License-Identifier: Apache-2.0
"""Line 3: a decode replica is killed while it streams; its streams go on elsewhere with the same tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import httpx
import psutil

from disagg.sdk.types import Replica
from tests.prove.faults_rows import CONFIG, books_row, chosen_row, count_row, judged
from tests.prove.report import Row
from tests.support.faults import (
    Load,
    change,
    engine_core,
    family,
    gone,
    kill9,
    process_of,
    reference,
    replicas,
    wait_replaced,
    wait_warm,
)
from tests.support.stack import Stack, running, wait_until

NUM_KILLS = 20
EACH = 3
"""Streams that a victim has open at least."""
PAUSE_S = 3.0


def mid_stream(
    num_kills: int = NUM_KILLS, *, sizes: tuple[int, int] = (1, 2), line: int = 3, what: str = "", seed: int = 3
) -> list[Row]:
    """Decode replicas are killed one after the other, of `sizes` prefill and decode replicas."""
    chosen = reference()
    chooser = random.Random(seed)
    marks: list[float] = []
    hit = 0
    orphans: list[psutil.Process] = []
    with running(CONFIG, name="prove-faults-decode", change=change(*sizes)) as stack:
        prefill = {r.incarnation for r in replicas(stack, "prefill")}
        with Load(stack.url, chosen.known) as load:
            load.wait_for(6)
            for number in range(num_kills):
                victim = _streaming(stack, load, chooser)
                orphans += family(victim)
                process = process_of(victim) if number % 2 == 0 else engine_core(victim)
                load.wait_streaming(EACH, victim.replica_id)
                hit += load.streaming(victim.replica_id)
                marks.append(kill9(process))
                wait_replaced(stack, "decode", [victim], size=sizes[1])
                wait_warm(stack)
            load.wait_for(6)
        left = gone(orphans)
        same = {r.incarnation for r in replicas(stack, "prefill")} == prefill
        resumes = resumed(stack)
        books = books_row(line, stack)
    bound = PAUSE_S + chosen.recompute_s
    wanted = EACH * num_kills
    print(f"    worst gap within 10 s of each kill: {', '.join(f'{gap:.1f}' for gap in gaps_after(load, marks))} s")
    print(f"    computing six of them again takes {chosen.recompute_s:.2f} s; the gateway counted {resumes}")
    return [
        chosen_row(line, chosen),
        count_row(line, f"{what}kills, every second one of the engine core", len(marks), num_kills),
        Row(line, "streams open on a killed replica", str(hit), f"at least {wanted}", hit >= wanted),
        *judged(line, load, marks=marks, max_gap_s=bound),
        Row(line, "the prefill engine lives on", "yes" if same else "no", "yes", same),
        count_row(line, "processes of killed replicas that are left", len(left), 0),
        books,
    ]


def gaps_after(load: Load, marks: Sequence[float], within_s: float = 10.0) -> list[float]:
    """Longest gap of all streams that were open at each mark, of those that ended soon after it."""
    return [
        max((h.gap_s for h in load.heard if h.started < mark < h.gap_at < mark + within_s), default=0.0)
        for mark in marks
    ]


def resumed(stack: Stack) -> dict[str, float]:
    """The gateway's counts of resumed, refused and failed streams, and the sum of the pauses."""
    found = {}
    for line in httpx.get(f"{stack.url}/metrics", timeout=30).text.splitlines():
        if line.startswith(("disagg_resumes_total{", "disagg_resume_diverged_total", "disagg_resume_gap_seconds_sum")):
            name, _, number = line.rpartition(" ")
            found[name.removeprefix("disagg_")] = round(float(number), 2)
    return found


def _streaming(stack: Stack, load: Load, chooser: random.Random) -> Replica:
    """One of the decode replicas, once it has enough open streams, a random moment later."""
    members = list(replicas(stack, "decode"))

    def busy() -> bool:
        return any(load.streaming(member.replica_id) >= EACH for member in members)

    wait_until(busy, 120, "a decode replica has enough open streams", 0.01)
    time.sleep(1.5 * chooser.random())
    chooser.shuffle(members)
    return max(members, key=lambda member: min(EACH, load.streaming(member.replica_id)))
