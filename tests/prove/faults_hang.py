# SPDX-License-Identifier: Apache-2.0
"""Line 4: engines that hang. Their processes are stopped, so their ports still listen and nothing in them answers."""

from __future__ import annotations

import contextlib
import time

import httpx

from disagg.errors import ClientError
from disagg.sdk.types import Replica
from tests.prove.faults_rows import CONFIG, chosen_row, count_row, judged
from tests.prove.report import Row
from tests.support.faults import (
    Load,
    change,
    engine_core,
    family,
    gone,
    kill9,
    reference,
    replicas,
    stopped,
    wait_replaced,
    wait_warm,
)
from tests.support.stack import Stack, running, wait_until

DETECTED_S = 10.0
REPLACED_S = 180.0
BRIEFLY_S = 12.0


def engine_stopped() -> list[Row]:
    chosen = reference()
    rows = [chosen_row(4, chosen)]
    marks: list[float] = []
    with (
        running(CONFIG, name="prove-faults-hang", change=change(1, 2)) as stack,
        Load(stack.url, chosen.known) as load,
    ):
        load.wait_for(6)
        for pool, size in (("prefill", 1), ("decode", 2)):
            rows += _core(stack, load, pool, size, marks)
        rows += _whole_replica(stack, load, marks)
        load.wait_for(6)
    return [*rows, *judged(4, load, marks=marks)]


def _core(stack: Stack, load: Load, pool: str, size: int, marks: list[float]) -> list[Row]:
    """Stop an engine core for good."""
    victim = replicas(stack, pool)[0]
    if pool == "decode":
        load.wait_streaming(1, victim.replica_id)
    members = family(victim)
    core = engine_core(victim)
    with stopped(core) as mark:
        marks.append(mark)
        detected_s = _detected(stack, pool, victim, mark)
        try:
            wait_replaced(stack, pool, [victim], size=size, timeout_s=REPLACED_S)
            replaced_s = time.monotonic() - mark
        except TimeoutError:
            replaced_s = None
        left = gone(members, 10)
        kill9(*left)
    wait_warm(stack)
    what = f"{pool} engine core stopped"
    return [
        _detected_row(what, detected_s),
        Row(
            4,
            f"{what}: replaced, every pair warm",
            "no" if replaced_s is None else f"after {replaced_s:.1f} s",
            f"{REPLACED_S:g} s",
            replaced_s is not None,
        ),
        count_row(4, f"{what}: processes of it left", len(left), 0),
    ]


def _whole_replica(stack: Stack, load: Load, marks: list[float]) -> list[Row]:
    """Stop every process of a decode replica for a while: its port listens, and its health does not answer."""
    victim = replicas(stack, "decode")[0]
    load.wait_streaming(1, victim.replica_id)
    with stopped(*family(victim)) as mark:
        marks.append(mark)
        detected_s = _detected(stack, "decode", victim, mark)
        time.sleep(max(0.0, mark + BRIEFLY_S - time.monotonic()))
    continued = time.monotonic()
    wait_until(lambda: _size_is(stack, "decode", 2), REPLACED_S, "both decode replicas are routable", 0.25)
    back_s = time.monotonic() - continued
    same = victim.incarnation in {replica.incarnation for replica in replicas(stack, "decode")}
    what = f"decode replica stopped for {BRIEFLY_S:g} s"
    figure = f"{back_s:.1f} s after, {'the same' if same else 'another'} replica"
    return [
        _detected_row(what, detected_s),
        Row(4, f"{what}: the pool is whole", figure, "printed", True),
    ]


def _detected_row(what: str, detected_s: float | None) -> Row:
    figure = "no" if detected_s is None else f"after {detected_s:.1f} s"
    return Row(4, f"{what}: not chosen any more", figure, f"{DETECTED_S:g} s", (detected_s or 1e9) <= DETECTED_S)


def _detected(stack: Stack, pool: str, victim: Replica, mark: float) -> float | None:
    """Seconds until the gateway says that the replica gets no requests; None when it took three times the bound."""
    while time.monotonic() < mark + 3 * DETECTED_S:
        with contextlib.suppress(ClientError, httpx.HTTPError):
            states = {r.incarnation: r.state for r in replicas(stack, pool)}
            if states.get(victim.incarnation) != "routable":
                return time.monotonic() - mark
        time.sleep(0.1)
    return None


def _size_is(stack: Stack, pool: str, size: int) -> bool:
    with contextlib.suppress(ClientError, httpx.HTTPError), stack.client() as client:
        return client.pool(pool).status().has_size(size)
    return False
