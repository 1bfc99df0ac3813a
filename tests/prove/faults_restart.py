# SPDX-License-Identifier: Apache-2.0
"""Line 5: the only prefill replica is restarted again and again; each time it is a new peer with a new engine id."""

from __future__ import annotations

import contextlib
import random
import time

import httpx

from disagg.errors import ClientError
from disagg.sdk.types import Replica
from tests.prove.faults_rows import CONFIG, books_row, chosen_row, count_row, judged
from tests.prove.report import Row
from tests.support.faults import Load, change, kill9, process_of, reference, replicas
from tests.support.stack import Stack, running, wait_until

NUM_RESTARTS = 20
HANDED_OFF_S = 15.0


def restarts(number: int = NUM_RESTARTS, seed: int = 5) -> list[Row]:
    chosen = reference(tokens=(8, 24))
    chooser = random.Random(seed)
    marks: list[float] = []
    waits: list[float] = []
    with running(CONFIG, name="prove-faults-restart", change=change(1, 1)) as stack:
        decode = {r.incarnation for r in replicas(stack, "decode")}
        [old] = replicas(stack, "prefill")
        engine_ids = [old.engine_id]
        with Load(stack.url, chosen.known) as load:
            load.wait_for(12)
            for _ in range(number):
                time.sleep(2 * chooser.random())
                marks.append(kill9(process_of(old)))
                new = _ready(stack, old)
                waits.append(_handed_off(load, new))
                engine_ids.append(new.engine_id)
                old = new
        same = {r.incarnation for r in replicas(stack, "decode")} == decode
        books = books_row(5, stack)
    return [
        chosen_row(5, chosen),
        count_row(5, "restarts with a new engine id", len(set(engine_ids)) - 1, number),
        *judged(5, load, marks=marks, at_least=60),
        Row(5, "the decode engine lives on", "yes" if same else "no", "yes", same),
        Row(
            5,
            "from ready to the first hand-off answered, worst",
            f"{max(waits):.1f} s",
            f"{HANDED_OFF_S:g} s",
            max(waits) <= HANDED_OFF_S,
        ),
        books,
    ]


def _ready(stack: Stack, old: Replica) -> Replica:
    """The successor, as soon as a gateway knows it: Serve publishes a replica when its engine has answered."""
    found: list[Replica] = []

    def there() -> bool:
        with contextlib.suppress(ClientError, httpx.HTTPError):
            found[:] = [r for r in replicas(stack, "prefill") if r.incarnation != old.incarnation and r.pid is not None]
        return bool(found)

    wait_until(there, 240, "the prefill replica is back", 0.1)
    return found[0]


def _handed_off(load: Load, new: Replica) -> float:
    """Seconds until an answer says that the new replica has computed its prompt."""
    started = time.monotonic()
    wait_until(
        lambda: any(heard.prefill == new.replica_id and heard.good for heard in load.since(started)),
        120,
        f"{new.replica_id} has computed a prompt",
        0.05,
    )
    return time.monotonic() - started
