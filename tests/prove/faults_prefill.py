# SPDX-License-Identifier: Apache-2.0
"""Lines 1 and 2: prefill replicas are killed under load, one of two, and all of them for a minute."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import psutil

from disagg.errors import ClientError
from disagg.sdk.types import Replica
from tests.prove.faults_rows import CONFIG, books_row, chosen_row, count_row, judged
from tests.prove.report import Row
from tests.support.faults import (
    Load,
    Reference,
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


def one_replica(
    num_kills: int = NUM_KILLS,
    *,
    sizes: tuple[int, int] = (2, 1),
    line: int = 1,
    what: str = "",
    max_gap_s: Callable[[Reference], float | None] = lambda _: None,
    seed: int = 1,
) -> list[Row]:
    """Prefill replicas are killed one after the other, of `sizes` prefill and decode replicas."""
    chosen = reference(tokens=SHORT)
    chooser = random.Random(seed)
    marks: list[float] = []
    orphans: list[psutil.Process] = []
    with running(CONFIG, name="prove-faults-one-prefill", change=change(*sizes)) as stack:
        decode = {r.incarnation for r in replicas(stack, "decode")}
        with Load(stack.url, chosen.known) as load:
            load.wait_for(12)
            for number in range(num_kills):
                time.sleep(3 * chooser.random())
                victim = chooser.choice(replicas(stack, "prefill"))
                marks.append(_kill(victim, whole_replica=number % 2 == 0, orphans=orphans))
                wait_replaced(stack, "prefill", [victim], size=sizes[0])
                wait_warm(stack)
            load.wait_for(12)
        left = gone(orphans)
        same = {r.incarnation for r in replicas(stack, "decode")} == decode
        used = {prefill for prefill, _ in load.by_replica(marks[-1])}
        books = books_row(line, stack)
    print(f"    answers by who computed the prompt, after the last kill: {sorted(used)}")
    return [
        chosen_row(line, chosen),
        count_row(line, f"{what}kills, every second one of the engine core", len(marks), num_kills),
        *judged(line, load, marks=marks, at_least=60, max_gap_s=max_gap_s(chosen)),
        Row(line, "the decode engine lives on", "yes" if same else "no", "yes", same),
        count_row(line, "processes of killed replicas that are left", len(left), 0),
        books,
    ]


def whole_pool(
    away_s: float = AWAY_S,
    *,
    pool: str = "prefill",
    sizes: tuple[int, int] = (2, 1),
    line: int = 2,
    max_first_good_s: float | None = FIRST_GOOD_S,
    then: Callable[[dict[str, Any]], None] | None = None,
) -> list[Row]:
    """Every replica of a pool is killed, and each that shows itself until `away_s` seconds are over."""
    size = sizes[0] if pool == "prefill" else sizes[1]
    chosen = reference(longest=PROMPT, tokens=SHORT)
    orphans: list[psutil.Process] = []
    with running(CONFIG, name=f"prove-faults-{pool}-pool", change=change(*sizes, then=then)) as stack:
        with Load(stack.url, chosen.known) as load:
            load.wait_for(12)
            victims = replicas(stack, pool)
            families = [family(victim) for victim in victims]
            mark = kill9(*(process for members in families for process in members[:1]))
            orphans += [process for members in families for process in members]
            kills = len(victims) + _keep_away(stack, pool, mark + away_s, orphans)
            away = [heard for heard in load.since(mark) if heard.started >= mark]
            wait_replaced(stack, pool, victims, size=size)
            wait_warm(stack)
            back = time.monotonic()
            load.wait_for(12)
        left = gone(orphans)
        handed_off = sum(number for (prefill, _), number in load.by_replica(back).items() if prefill != "local")
        books = books_row(line, stack)
    ended = [heard for heard in load.heard if heard.ended and heard.ended < mark]
    before = statistics.median(heard.ended - heard.started for heard in ended)
    print(
        f"    {pool} replicas killed: {kills}; while away by who computed: {dict(Counter(h.prefill for h in away))}, "
        f"by who answered: {dict(Counter(h.decode for h in away))}; "
        f"an answer took p50 {before:.2f} s before"
    )
    return [
        chosen_row(line, chosen),
        *judged(line, load, marks=[mark], at_least=60, max_first_good_s=max_first_good_s),
        Row(line, f"answered while the {pool} pool is away", str(len(away)), "at least 60", len(away) >= 60),
        Row(line, "prompts handed off afterwards", str(handed_off), "some", handed_off > 0),
        count_row(line, "processes of killed replicas that are left", len(left), 0),
        books,
    ]


def _kill(victim: Replica, *, whole_replica: bool, orphans: list[psutil.Process]) -> float:
    """SIGKILL the replica's process, or its engine core alone; all of its family has to go then."""
    orphans += family(victim)
    return kill9(process_of(victim) if whole_replica else engine_core(victim))


def _keep_away(stack: Stack, pool: str, until: float, orphans: list[psutil.Process]) -> int:
    """Kill every replica of a pool as soon as it shows itself. Returns how many did."""
    killed: set[int] = set()
    while time.monotonic() < until:
        with contextlib.suppress(ClientError, httpx.HTTPError, psutil.NoSuchProcess):
            for replica in replicas(stack, pool):
                if replica.pid is not None and replica.pid not in killed:
                    killed.add(replica.pid)
                    orphans += family(replica)
                    kill9(process_of(replica))
        time.sleep(0.2)
    return len(killed)
