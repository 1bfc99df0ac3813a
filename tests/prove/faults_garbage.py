# SPDX-License-Identifier: Apache-2.0
"""Line 8: garbage, and silence, at every port that a deployment opens, under load. Nobody notices and nothing leaks.

Ray's own ports (its daemons, and the gRPC server in each of its workers) are listed and left alone: they must not be
reachable for anybody else, which is the network's business.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import psutil

from tests.prove.faults_rows import CONFIG, books_row, chosen_row, judged
from tests.prove.report import Row
from tests.support.fault_cases import Reference
from tests.support.faults import Load, change, reference, wait_until, wait_warm
from tests.support.garbage import Door, doors, silence, still_open, throw_all
from tests.support.stack import Stack, is_warm, running
from tests.support.tiers import tiers

LINE = 8
CLIENTS = 6
SILENT = 10_000
HELD_S = 3.0
BACK_S = 180.0
MORE_FDS = 24
"""Of all processes with one title together: a client or two of the load, a connection to a peer."""
MORE_MIB = 256
"""Likewise; the allocators of a process that has held 10,000 connections keep some of their memory."""


@dataclass(frozen=True)
class Held:
    """What processes with one title have together."""

    num_fds: int
    mib: int


def garbage(silent: int = SILENT) -> list[Row]:
    chosen = reference(12)
    rows = [chosen_row(LINE, chosen)]
    rows += _at_each("nixl", chosen, silent, sink="unused")
    rows += _at_each("mooncake", chosen, silent, sink=None)
    return rows


def _at_each(transport: str, chosen: Reference, silent: int, *, sink: str | None) -> list[Row]:
    applied = change(1, 1, then=tiers(transport=transport, sink=sink))
    with running(CONFIG, name=f"prove-faults-garbage-{transport}", change=applied) as stack:
        found = doors(stack.process.pid)
        ours = [door for door in found if not door.rays]
        for door in found:
            print(f"    {'left alone' if door.rays else 'attacked':<11} {door}", flush=True)
        with Load(stack.url, chosen.known, clients=CLIENTS) as load:
            load.wait_for(2 * CLIENTS)
            before, engines = _held(stack), _incarnations(stack)
            most = [_attack(door, silent) for door in ours]
            mark = time.monotonic()
            load.wait_for(2 * CLIENTS)
        wait_warm(stack)
        back = _back(stack, before)
        rows = judged(LINE, load, marks=[mark], at_least=4 * CLIENTS, what=transport)
        return [
            Row(
                LINE,
                f"{transport}: ports of the deployment, and of Ray",
                f"{len(ours)}, {len(found) - len(ours)}",
                "printed",
                True,
            ),
            Row(
                LINE,
                f"{transport}: silent connections at once, least and most",
                f"{min(most)}, {max(most)}",
                "printed",
                True,
            ),
            *rows,
            Row(
                LINE, f"{transport}: all pools serve", "yes" if is_warm(stack.url) else "no", "yes", is_warm(stack.url)
            ),
            _engines_row(transport, engines, _incarnations(stack)),
            back,
            books_row(LINE, stack),
        ]


def _attack(door: Door, silent: int) -> int:
    """Everything at one port; returns how many silent connections stood at once."""
    outcomes = throw_all(door.host, door.port)
    with silence(door.host, door.port, silent) as connections:
        stood = len(connections)
        time.sleep(HELD_S)
        left = still_open(connections)
    told = ", ".join(f"{number} {what}" for what, number in sorted(outcomes.items()))
    alive = "" if psutil.pid_exists(door.pid) else "; ITS PROCESS IS GONE"
    print(f"    {door}: {told}; of {stood} silent ones {left} open after {HELD_S:g} s{alive}", flush=True)
    return stood


def _incarnations(stack: Stack) -> Counter[str]:
    return Counter(stats["incarnation"] for pool in stack.stats().values() for stats in pool)


def _engines_row(transport: str, before: Counter[str], after: Counter[str]) -> Row:
    lost = (before - after).total()
    return Row(LINE, f"{transport}: engines restarted", str(lost), "0", lost == 0)


def _held(stack: Stack) -> dict[str, Held]:
    """By title of the process; those that come and go with Ray's own work are left out."""
    found: dict[str, Held] = {}
    top = psutil.Process(stack.process.pid)
    for process in [top, *top.children(recursive=True)]:
        try:
            title = (process.cmdline() or [process.name()])[0].rsplit("/", 1)[-1]
            held = Held(process.num_fds(), process.memory_info().rss >> 20)
        except psutil.Error:
            continue
        if not title.startswith("ray::IDLE"):
            old = found.get(title, Held(0, 0))
            found[title] = Held(old.num_fds + held.num_fds, old.mib + held.mib)
    return found


def _grown(before: dict[str, Held], now: dict[str, Held]) -> list[str]:
    """What has more than it may, in words."""
    grown = []
    for title, held in now.items():
        old = before.get(title)
        if old is None:
            continue
        if held.num_fds > old.num_fds + MORE_FDS:
            grown.append(f"{title}: {old.num_fds} -> {held.num_fds} fds")
        if held.mib > old.mib + MORE_MIB:
            grown.append(f"{title}: {old.mib} -> {held.mib} MiB")
    return grown


def _back(stack: Stack, before: dict[str, Held]) -> Row:
    try:
        took = wait_until(
            lambda: not _grown(before, _held(stack)), BACK_S, "descriptors and memory are given back", 1.0
        )
        figure = f"after {took:.0f} s"
    except TimeoutError:
        figure = "; ".join(_grown(before, _held(stack)))[:200]
    bound = f"+{MORE_FDS} fds, +{MORE_MIB} MiB"
    return Row(LINE, "file descriptors and memory are back", figure, bound, figure.startswith("after"))
