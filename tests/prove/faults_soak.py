# SPDX-License-Identifier: Apache-2.0
"""Line 10: half an hour of load with a random fault every few seconds, and what is left of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.prove.faults_decode import resumed
from tests.prove.faults_rows import CONFIG, books_row, chosen_row, count_row, judged, room
from tests.prove.report import Row
from tests.prove.serve_leaving import wave
from tests.support.fault_usage import SHARED_MEMORY, Usage, kv_in_use, unowned_shared_files, usage, wait_idle
from tests.support.faults import (
    Load,
    change,
    engine_core,
    family,
    kill9,
    process_of,
    reference,
    replicas,
    stopped,
    wait_replaced,
    wait_until,
    wait_warm,
)
from tests.support.stack import Stack, running

SOAK_S = 1800.0
WARM_UP_S = 120.0
"""Of load before the first measurement, and every kind of fault once, so that what loads once is loaded."""
MEMORY_SHARE = 0.10
"""Of all memory: an engine touches more of its KV space (1 GiB each here) the longer it lives."""
GATEWAY, GATEWAY_MIB = "ServeReplica:disagg:gateway", 64.0
"""The gateway is never replaced here, so what it leaks adds up."""
NUM_FDS, NUM_FILES = 100, 4
"""What may be more afterwards. The numbers of a process vary by a few with its pools of threads and connections."""
SWEPT_S = 75.0
"""Replicas look for files of killed processes every 30 s."""
SIZES = {"prefill": 1, "decode": 2}

Fault = Callable[[Stack, Load, random.Random], None]


def soak(soak_s: float = SOAK_S, seed: int = 10) -> list[Row]:
    chosen = reference()
    chooser = random.Random(seed)
    shared_before = frozenset(SHARED_MEMORY.iterdir())
    counted: Counter[str] = Counter()
    changed = change(SIZES["prefill"], SIZES["decode"], then=room)
    with running(CONFIG, name="prove-faults-soak", change=changed) as stack:
        with Load(stack.url, chosen.known) as warm_up:
            time.sleep(min(WARM_UP_S, soak_s / 4))
            for fault in FAULTS:
                _run(fault, stack, warm_up, chooser)
        wait_idle(stack)
        before = usage(stack)
        unowned = len(unowned_shared_files(shared_before))
        with Load(stack.url, chosen.known) as load:
            deadline = time.monotonic() + soak_s
            while time.monotonic() < deadline:
                time.sleep(5 * chooser.random())
                fault = chooser.choice(FAULTS)
                _run(fault, stack, load, chooser)
                counted[fault.__name__.strip("_")] += 1
        idle = wait_idle(stack)
        books = books_row(10, stack)
        held = kv_in_use(stack)
        after = usage(stack)
        left = _left(shared_before, unowned)
        print(f"    faults: {dict(counted)}; {resumed(stack)}")
        print(f"    before: {before.words()} {before.by_kind}\n    after:  {after.words()} {after.by_kind}")
    return [
        chosen_row(10, chosen),
        Row(10, "faults, seeded", str(sum(counted.values())), "printed", bool(counted)),
        *judged(10, warm_up, what="warm-up"),
        *judged(10, load, at_least=100),
        *grown(before, after),
        count_row(10, "files in /dev/shm that nobody uses, more than before", max(0, left), 0),
        Row(10, "KV blocks in use at the end", str(held), "0 everywhere", idle),
        books,
    ]


def grown(before: Usage, after: Usage) -> list[Row]:
    """Rows on what the application holds more than before, same sizes of pools."""
    memory = after.memory_mib - before.memory_mib
    allowed = MEMORY_SHARE * before.memory_mib
    gateway = after.by_kind.get(GATEWAY, 0.0) - before.by_kind.get(GATEWAY, 0.0)
    fds = after.num_fds - before.num_fds
    files = after.shared_files - before.shared_files
    processes = after.num_processes - before.num_processes
    return [
        Row(10, "memory more than before", f"{memory:+.0f} MiB", f"{allowed:.0f} MiB", memory <= allowed),
        Row(
            10,
            "memory of the gateway more than before",
            f"{gateway:+.0f} MiB",
            f"{GATEWAY_MIB:.0f} MiB",
            gateway <= GATEWAY_MIB,
        ),
        Row(10, "file descriptors more than before", f"{fds:+d}", str(NUM_FDS), fds <= NUM_FDS),
        Row(10, "files in shared memory more than before", f"{files:+d}", str(NUM_FILES), files <= NUM_FILES),
        Row(10, "processes more than before", f"{processes:+d}", "2", processes <= 2),
    ]


def _left(before: frozenset[Path], unowned: int) -> int:
    """How many more files nobody uses than `unowned`, after the time in which replicas look for them."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: len(unowned_shared_files(before)) <= unowned, SWEPT_S, "files are removed")
    return len(unowned_shared_files(before)) - unowned


def _run(fault: Fault, stack: Stack, load: Load, chooser: random.Random) -> None:
    """One fault, and the application whole again."""
    fault(stack, load, chooser)
    for pool, size in SIZES.items():
        wait_replaced(stack, pool, [], size=size)
    wait_warm(stack)


def _kill_prefill(stack: Stack, load: Load, chooser: random.Random) -> None:
    victim = chooser.choice(replicas(stack, "prefill"))
    kill9(process_of(victim) if chooser.random() < 0.5 else engine_core(victim))
    wait_replaced(stack, "prefill", [victim], size=SIZES["prefill"])


def _kill_decode(stack: Stack, load: Load, chooser: random.Random) -> None:
    victim = chooser.choice(replicas(stack, "decode"))
    load.wait_streaming(1, victim.replica_id)
    kill9(process_of(victim) if chooser.random() < 0.5 else engine_core(victim))
    wait_replaced(stack, "decode", [victim], size=SIZES["decode"])


def _hang_for_good(stack: Stack, load: Load, chooser: random.Random) -> None:
    pool = chooser.choice(list(SIZES))
    victim = chooser.choice(replicas(stack, pool))
    with stopped(engine_core(victim)):
        wait_replaced(stack, pool, [victim], size=SIZES[pool])


def _hang_briefly(stack: Stack, load: Load, chooser: random.Random) -> None:
    pool = chooser.choice(list(SIZES))
    with stopped(*family(chooser.choice(replicas(stack, pool)))):
        time.sleep(4 + 6 * chooser.random())


def _clients_leave(stack: Stack, load: Load, chooser: random.Random) -> None:
    clients = [(chooser.randrange(1000), 2 * chooser.random()) for _ in range(12)]
    asyncio.run(wave(stack.url, clients, chooser))


def _scale(stack: Stack, load: Load, chooser: random.Random) -> None:
    with stack.client() as client:
        client.pool("prefill").scale(SIZES["prefill"] + 1).wait(timeout_s=300)
        load.wait_for(6)
        processes = [process_of(replica) for replica in replicas(stack, "prefill")]
        client.pool("prefill").scale(SIZES["prefill"]).wait(timeout_s=300)
    wait_until(lambda: len(replicas(stack, "prefill")) == SIZES["prefill"], 60, "the prefill pool is small again")
    # What leaves holds memory until it is gone, and would be counted as what was there before.
    size = SIZES["prefill"]
    wait_until(lambda: sum(p.is_running() for p in processes) == size, 120, "the replica that left has ended")


FAULTS: tuple[Fault, ...] = (_kill_prefill, _kill_decode, _hang_for_good, _hang_briefly, _clients_leave, _scale)
