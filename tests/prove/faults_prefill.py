# SPDX-License-Identifier: Apache-2.0
"""Lines 1 and 2: prefill replicas are killed under load, one of two, and all of them for a minute."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections import Counter

import httpx
import psutil

from disagg.errors import ClientError
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
from tests.support.stack import Stack, running

NUM_KILLS = 20
AWAY_S = 60.0
FIRST_GOOD_S = 2.0
SHORT = (8, 24)
"""Tokens of an answer, so that an answer's end follows its prefill closely."""
PROMPT = 400
"""Tokens of a prompt of line 2 at most: its bound is on the way to decode, not on the time to compute six prompts
beside two engines that start."""


def one_replica(num_kills: int = NUM_KILLS, seed: int = 1) -> list[Row]:
    chosen = reference(tokens=SHORT)
    chooser = random.Random(seed)
    marks: list[float] = []
    orphans: list[psutil.Process] = []
    with running(CONFIG, name="prove-faults-one-prefill", change=change(2, 1)) as stack:
        decode = {r.incarnation for r in replicas(stack, "decode")}
        with Load(stack.url, chosen.known) as load:
            load.wait_for(12)
            for number in range(num_kills):
                time.sleep(3 * chooser.random())
                victim = chooser.choice(replicas(stack, "prefill"))
                marks.append(_kill(victim, whole_replica=number % 2 == 0, orphans=orphans))
                wait_replaced(stack, "prefill", [victim], size=2)
                wait_warm(stack)
            load.wait_for(12)
        left = gone(orphans)
        same = {r.incarnation for r in replicas(stack, "decode")} == decode
        used = {prefill for prefill, _ in load.by_replica(marks[-1])}
        books = books_row(1, stack)
    print(f"    answers by who computed the prompt, after the last kill: {sorted(used)}")
    return [
        chosen_row(1, chosen),
        count_row(1, "kills, every second one of the engine core", len(marks), num_kills),
        *judged(1, load, marks=marks, at_least=60),
        Row(1, "the decode engine lives on", "yes" if same else "no", "yes", same),
        count_row(1, "processes of killed replicas that are left", len(left), 0),
        books,
    ]


def whole_pool(away_s: float = AWAY_S) -> list[Row]:
    chosen = reference(longest=PROMPT, tokens=SHORT)
    orphans: list[psutil.Process] = []
    with running(CONFIG, name="prove-faults-prefill-pool", change=change(2, 1)) as stack:
        with Load(stack.url, chosen.known) as load:
            load.wait_for(12)
            victims = replicas(stack, "prefill")
            families = [family(victim) for victim in victims]
            mark = kill9(*(process for members in families for process in members[:1]))
            orphans += [process for members in families for process in members]
            kills = len(victims) + _keep_away(stack, mark + away_s, orphans)
            away = [heard for heard in load.since(mark) if heard.started >= mark]
            wait_replaced(stack, "prefill", victims, size=2)
            wait_warm(stack)
            back = time.monotonic()
            load.wait_for(12)
        left = gone(orphans)
        handed_off = sum(number for (prefill, _), number in load.by_replica(back).items() if prefill != "local")
        books = books_row(2, stack)
    ended = [heard for heard in load.heard if heard.ended and heard.ended < mark]
    before = statistics.median(heard.ended - heard.started for heard in ended)
    print(
        f"    prefill replicas killed: {kills}; while away: {dict(Counter(heard.prefill for heard in away))}; "
        f"an answer took p50 {before:.2f} s before"
    )
    return [
        chosen_row(2, chosen),
        *judged(2, load, marks=[mark], at_least=60, max_first_good_s=FIRST_GOOD_S),
        Row(2, "requests sent and answered while the pool is away", str(len(away)), "at least 60", len(away) >= 60),
        Row(2, "prompts computed by the new replicas afterwards", str(handed_off), "some", handed_off > 0),
        count_row(2, "processes of killed replicas that are left", len(left), 0),
        books,
    ]


def _kill(victim: Replica, *, whole_replica: bool, orphans: list[psutil.Process]) -> float:
    """SIGKILL the replica's process, or its engine core alone; all of its family has to go then."""
    orphans += family(victim)
    return kill9(process_of(victim) if whole_replica else engine_core(victim))


def _keep_away(stack: Stack, until: float, orphans: list[psutil.Process]) -> int:
    """Kill every prefill replica as soon as it shows itself. Returns how many did."""
    killed: set[int] = set()
    while time.monotonic() < until:
        with contextlib.suppress(ClientError, httpx.HTTPError, psutil.NoSuchProcess):
            for replica in replicas(stack, "prefill"):
                if replica.pid is not None and replica.pid not in killed:
                    killed.add(replica.pid)
                    orphans += family(replica)
                    kill9(process_of(replica))
        time.sleep(0.2)
    return len(killed)
