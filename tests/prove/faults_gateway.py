# SPDX-License-Identifier: Apache-2.0
"""Line 7: one of two gateway replicas is killed, then the Serve controller, while clients stream."""

from __future__ import annotations

import time
from typing import Any

import httpx
import psutil

from tests.prove.faults_rows import CONFIG, SHOWN, chosen_row, count_row
from tests.prove.report import Row
from tests.support.faults import Load, change, kill9, reference, replicas, wait_until
from tests.support.serve_control import controller, open_dashboard, serve_replicas, wait_settled
from tests.support.stack import Stack, running

NAME = "prove-faults-gateway"
NEW_S = 1.0
AFTER_S = 20.0
LEASE_S = 30.0
_ENDS = ("consumed", "released", "rescued", "expired", "failed")


def gateways() -> list[Row]:
    chosen = reference(tokens=(24, 120))
    with open_dashboard(), running(CONFIG, name=NAME, change=change(1, 1, then=_two_gateways)) as stack:
        engines = {r.incarnation for pool in ("prefill", "decode") for r in replicas(stack, pool)}
        wait_until(lambda: len(serve_replicas(stack, "gateway")) == 2, 120, "two gateways run", 0.5)
        with Load(stack.url, chosen.known) as load:
            load.wait_for(12)
            gateway = _kill_gateway(stack, load)
            serving = _kill_controller(stack, load)
        same = {r.incarnation for pool in ("prefill", "decode") for r in replicas(stack, pool)} == engines
        books = _foreign_books(stack)
    for problem in [*load.failed[:SHOWN], *load.wrong[:SHOWN]]:
        print(f"    {problem[:400]}")
    return [
        chosen_row(7, chosen),
        Row(7, "requests", str(len(load.heard)), "at least 60", len(load.heard) >= 60),
        count_row(7, "wrong tokens", len(load.wrong), 0),
        *gateway,
        *serving,
        Row(7, "no engine was restarted", "yes" if same else "no", "yes", same),
        *books,
    ]


def _two_gateways(config: dict[str, Any]) -> None:
    for deployment in config["applications"][0]["deployments"]:
        if deployment["name"] == "gateway":
            deployment["num_replicas"] = 2


def _kill_gateway(stack: Stack, load: Load) -> list[Row]:
    load.wait_streaming(4)
    victim = next(iter(serve_replicas(stack, "gateway").items()))
    num_open = load.streaming()
    mark = kill9(psutil.Process(victim[1]))
    load.wait_for(24)
    wait_until(lambda: victim[0] not in (now := serve_replicas(stack, "gateway")) and len(now) == 2, 180, "two again")
    wait_settled(stack)
    load.wait_for(12)
    ended = load.since(mark)
    cut = [h for h in ended if h.failed and h.started < mark]
    later = [h for h in ended if h.failed and h.started >= mark]
    first = load.first_text_after(mark)
    before = [h for h in load.heard if h.failed and h not in ended]
    return [
        Row(
            7,
            "gateway killed: open requests that ended with it",
            f"{len(cut)}; {num_open} streams were open on both",
            "some go on",
            len(cut) < len([h for h in ended if h.started < mark]),
        ),
        count_row(7, "gateway killed: requests sent afterwards that failed", len(later), 0),
        count_row(7, "failed before it", len(before), 0),
        Row(
            7,
            "gateway killed: first text of a request sent afterwards",
            "none" if first is None else f"{first:.2f} s",
            f"{NEW_S:g} s",
            first is not None and first <= NEW_S,
        ),
    ]


def _kill_controller(stack: Stack, load: Load) -> list[Row]:
    load.wait_streaming(4)
    mark = kill9(controller(stack))
    time.sleep(AFTER_S)
    back = wait_settled(stack)
    load.wait_for(12)
    ended = load.since(mark)
    failed = [h for h in ended if h.failed]
    first = load.first_text_after(mark)
    return [
        Row(7, "controller killed: answers since then", str(len(ended)), "at least 20", len(ended) >= 20),
        count_row(7, "controller killed: streams and requests that failed", len(failed), 0),
        Row(
            7,
            "controller killed: first text of a request sent afterwards; worst of the whole load",
            "none" if first is None else f"{first:.2f} s; {load.worst_first():.2f} s",
            "printed",
            first is not None,
        ),
        Row(7, "controller killed: it tells of an application again", f"after {AFTER_S + back:.0f} s", "printed", True),
    ]


def _foreign_books(stack: Stack) -> list[Row]:
    """What the gateways that live know of the hand-offs of the one that was killed, once every lease has ended."""
    deadline = time.monotonic() + LEASE_S + 15
    while True:
        # Each request may meet another gateway, and the new one knows less than the one that was there.
        found = [_asked(stack) for _ in range(6)]
        most = max(found, key=lambda listed: listed["totals"]["produced"]["count"])
        if not most["num_open"] or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    counts = {word: most["totals"][word]["count"] for word in ("produced", *_ENDS)}
    figure = ", ".join(f"{word} {number}" for word, number in counts.items() if number)
    whole = most["balanced"] and not most["num_open"] and counts["produced"] == sum(counts[word] for word in _ENDS)
    return [Row(7, "the others' books tell of its hand-offs", figure, "all ended", whole and counts["produced"] > 0)]


def _asked(stack: Stack) -> dict[str, Any]:
    answer = httpx.get(
        f"{stack.url}/admin/v1/handoffs",
        params={"gateway": "other", "limit": 0},
        headers={"authorization": f"Bearer {stack.admin_key}"},
        timeout=30,
    )
    answer.raise_for_status()
    listed: dict[str, Any] = answer.json()
    return listed
