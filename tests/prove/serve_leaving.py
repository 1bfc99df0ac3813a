# SPDX-License-Identifier: Apache-2.0
"""Line 5: clients that leave at random moments leave nothing behind in either engine."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import statistics
import time
from collections import Counter

import httpx

from tests.prove.report import ROOT, Row
from tests.support.answers import Case, ask, difference
from tests.support.faults import change
from tests.support.stack import Stack, running

CONFIG = ROOT / "configs" / "quickstart.yaml"
NUM_CLIENTS = 100
AT_ONCE = 4
IDLE_S = 2.0
LEASE_S = 30


def leaving() -> list[Row]:
    # An engine ends nothing within a step, and in bfloat16 a step of 2,048 tokens alone can take longer than the bound.
    with running(CONFIG, name="prove-leaving", change=change(1, 1)) as stack:
        return leave(stack, NUM_CLIENTS)


def leave(stack: Stack, num_clients: int, line: int = 5) -> list[Row]:
    """Rows for `num_clients` that leave, `AT_ONCE` at a time; after each wave both engines have to be idle."""
    chooser = random.Random(5)
    healthy = Case(
        "healthy", "/v1/completions", {"model": "tiny", "prompt": [30] * 300, "max_tokens": 8, "temperature": 0}
    )
    first = asyncio.run(_once(stack, healthy))
    unit_s = first_text_s(stack.url)
    base = {pool: [s["kv_cache_usage"] for s in stats] for pool, stats in stack.stats().items()}
    engines = {pool: [s["incarnation"] for s in stats] for pool, stats in stack.stats().items()}
    before = phases_at_the_gateway(stack)
    phases: Counter[str] = Counter()
    waits: list[float] = []
    for start in range(0, num_clients, AT_ONCE):
        clients = [(start + i, unit_s * chooser.choice((0.2, 1, 1, 2, 8)) * chooser.random()) for i in range(AT_ONCE)]
        for phase in asyncio.run(wave(stack.url, clients, chooser)):
            phases[phase] += 1
        waits.append(idle_after(stack, base, LEASE_S))
    last = asyncio.run(_once(stack, healthy))
    stats = stack.stats()
    expired = sum(s["num_kv_expired_reqs_total"] for s in stats["prefill"])
    same = {pool: [s["incarnation"] for s in pool_stats] for pool, pool_stats in stats.items()} == engines
    seen = phases_at_the_gateway(stack) - before
    idle = statistics.median(waits)
    print(f"    clients had: {dict(phases)}; legs at the gateway: {dict(seen)}; idle after p50 {idle:.2f} s")
    return [
        Row(
            line,
            "phases in which clients left",
            ", ".join(sorted(seen)),
            "prefill, decode and stream",
            len(seen) >= 3 or num_clients < NUM_CLIENTS,
        ),
        Row(
            line, "clients that left", str(sum(phases.values())), str(num_clients), sum(phases.values()) == num_clients
        ),
        Row(
            line,
            "longest wait until both engines were idle",
            f"{max(waits):.2f} s",
            f"{IDLE_S:g} s",
            max(waits) <= IDLE_S,
        ),
        Row(line, "hand-offs that only the lease ended", str(expired), "0", expired == 0),
        Row(
            line,
            "both engines live on, same answer as before",
            "yes" if same else "no",
            "yes",
            same and difference(first, last) is None,
        ),
    ]


def phases_at_the_gateway(stack: Stack) -> Counter[str]:
    """What the gateway was doing for the clients that have left, as it counted them."""
    text = httpx.get(f"{stack.url}/metrics", timeout=30).text
    found = re.findall(r'disagg_client_disconnects_total\{phase="(\w+)"\} (\S+)', text)
    return Counter({phase: int(float(number)) for phase, number in found if float(number)})


async def _once(stack: Stack, case: Case):  # type: ignore[no-untyped-def]
    async with httpx.AsyncClient(timeout=60) as client:
        return await ask(client, stack.url, case)


def first_text_s(url: str) -> float:
    """Seconds to the first text of a stream whose prompt is as long as a leaving client's on average; median of three.

    Clients leave in every phase of a request, however fast the machine is, when they measure by it.
    """

    async def one(client: httpx.AsyncClient, number: int) -> float:
        started, took = time.monotonic(), 0.0
        body = _body(number, stream=True) | {"max_tokens": 4}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            async for _ in answer.aiter_bytes():
                took = took or time.monotonic() - started
        return took

    async def all_of_them() -> list[float]:
        async with httpx.AsyncClient(timeout=60) as client:
            return [await one(client, number) for number in (20, 60, 100)]

    return statistics.median(asyncio.run(all_of_them()))


async def wave(url: str, clients: list[tuple[int, float]], chooser: random.Random) -> list[str]:
    """Clients that leave after so many seconds each, by number. Returns what each had seen."""
    async with contextlib.AsyncExitStack() as stack:
        # One client takes tens of milliseconds to make. They are made before the first one's time begins.
        made = [await stack.enter_async_context(httpx.AsyncClient(timeout=60)) for _ in clients]
        leaving = zip(made, clients, strict=True)
        return await asyncio.gather(
            *(_leave_one(c, url, n, delay, chooser.random() < 0.7) for c, (n, delay) in leaving)
        )


async def _leave_one(client: httpx.AsyncClient, url: str, number: int, delay: float, stream: bool) -> str:
    """One client: sends a long prompt and closes its connection `delay` seconds later. Returns what it had seen."""
    seen = "nothing"

    async def talk() -> None:
        nonlocal seen
        async with client.stream("POST", f"{url}/v1/completions", json=_body(number, stream=stream)) as r:
            seen = "head"
            async for _ in r.aiter_bytes():
                seen = "tokens"

    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(talk(), delay)
        seen = "whole answer"
    return seen


def _body(number: int, *, stream: bool) -> dict[str, object]:
    prompt = [20 + (number * 31 + i * 7) % 1400 for i in range(400 + 61 * (number % 40))]
    return {"model": "tiny", "prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": stream}


def idle_after(stack: Stack, base: dict[str, list[float]], limit_s: float) -> float:
    """Seconds until every engine reports nothing running and the KV use in `base`; beyond `limit_s` if none does so."""
    started = time.monotonic()
    while time.monotonic() - started <= limit_s:
        stats = stack.stats()
        asked = time.monotonic()
        busy = [
            s
            for pool, pool_stats in stats.items()
            for s, usage in zip(pool_stats, base[pool], strict=True)
            if s["num_requests_running"] or s["num_requests_waiting"] or s["kv_cache_usage"] > usage + 1e-9
        ]
        if not busy:
            return asked - started
        time.sleep(0.05)
    return time.monotonic() - started
