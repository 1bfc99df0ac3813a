# SPDX-License-Identifier: Apache-2.0
"""Line 5: clients that leave at random moments leave nothing behind in either engine."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import statistics
import time
import uuid
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
LEFT = 0.8
"""Share of the clients that have to leave before the end of their answer, so that the rows say something."""
COUNTED = 0.5
"""Share of the clients that the gateway has to have seen leave. Some leave before it has read of them."""
WHOLE = "whole answer"
REFUSED = "status"


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
    kept = idle_after(stack, LEASE_S)
    engines = {pool: [s["incarnation"] for s in stats] for pool, stats in stack.stats().items()}
    before = phases_at_the_gateway(stack)
    phases: Counter[str] = Counter()
    waits: list[float] = []
    for start in range(0, num_clients, AT_ONCE):
        clients = [(start + i, unit_s * chooser.choice((0.2, 1, 1, 2, 8)) * chooser.random()) for i in range(AT_ONCE)]
        for phase in asyncio.run(wave(stack.url, clients, chooser)):
            phases[phase] += 1
        waits.append(idle_after(stack, LEASE_S))
    last = asyncio.run(_once(stack, healthy))
    stats = stack.stats()
    expired = sum(s["num_kv_expired_reqs_total"] for s in stats["prefill"])
    same = {pool: [s["incarnation"] for s in pool_stats] for pool, pool_stats in stats.items()} == engines
    seen = phases_at_the_gateway(stack) - before
    left = num_left(phases)
    idle = statistics.median(waits)
    print(f"    clients had: {dict(phases)}; legs at the gateway: {dict(seen)}; idle after p50 {idle:.2f} s")
    return [
        Row(
            line,
            "phases in which clients left",
            ", ".join(sorted(seen)),
            "prefill, decode and stream",
            {"prefill", "decode", "stream"} <= set(seen) or num_clients < NUM_CLIENTS,
        ),
        Row(
            line,
            "clients that left before their answer's end, as clients and as the gateway count",
            f"{left}, {sum(seen.values())}",
            f"at least {LEFT * num_clients:g}, {COUNTED * num_clients:g} of {num_clients}",
            left >= LEFT * num_clients and sum(seen.values()) >= COUNTED * num_clients,
        ),
        Row(line, "both engines hold no KV before", f"after {kept:.2f} s", f"{LEASE_S:g} s", kept <= LEASE_S),
        Row(
            line,
            "longest wait until both engines, in float32, were idle and held no KV",
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


def num_left(seen: Counter[str]) -> int:
    """How many of a wave's clients left before their answers had ended. Refused ones did not."""
    return sum(number for what, number in seen.items() if what != WHOLE and not what.startswith(REFUSED))


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
    salt = uuid.uuid4().hex

    async def one(client: httpx.AsyncClient, number: int) -> float:
        started, took = time.monotonic(), 0.0
        body = _body(number, salt, stream=True) | {"max_tokens": 4}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for _ in answer.aiter_bytes():
                took = took or time.monotonic() - started
        assert took, "the stream had no text"
        return took

    async def all_of_them() -> list[float]:
        async with httpx.AsyncClient(timeout=60) as client:
            return [await one(client, number) for number in (20, 60, 100)]

    return statistics.median(asyncio.run(all_of_them()))


async def wave(url: str, clients: list[tuple[int, float]], chooser: random.Random) -> list[str]:
    """Clients that leave after so many seconds each, by number. Returns what each had seen.

    No prompt of another wave, or of another user of the application, is in any cache of theirs.
    """
    salt = uuid.uuid4().hex
    async with contextlib.AsyncExitStack() as stack:
        # One client takes tens of milliseconds to make. They are made before the first one's time begins.
        made = [await stack.enter_async_context(httpx.AsyncClient(timeout=60)) for _ in clients]
        leaving = zip(made, clients, strict=True)
        return await asyncio.gather(
            *(_leave_one(c, url, _body(n, salt, stream=chooser.random() < 0.7), delay) for c, (n, delay) in leaving)
        )


async def _leave_one(client: httpx.AsyncClient, url: str, body: dict[str, object], delay: float) -> str:
    """One client: sends a long prompt and closes its connection `delay` seconds later. Returns what it had seen."""
    seen = "nothing"

    async def talk() -> None:
        nonlocal seen
        async with client.stream("POST", f"{url}/v1/completions", json=body) as r:
            seen = "head" if r.status_code == 200 else f"{REFUSED} {r.status_code}"
            async for _ in r.aiter_bytes():
                if r.status_code == 200:
                    seen = "tokens"

    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(talk(), delay)
        seen = seen if seen.startswith(REFUSED) else WHOLE
    return seen


def _body(number: int, salt: str, *, stream: bool) -> dict[str, object]:
    prompt = [20 + (number * 31 + i * 7) % 1400 for i in range(400 + 61 * (number % 40))]
    asked = {"max_tokens": 1200, "ignore_eos": True, "stream": stream, "cache_salt": salt}
    return {"model": "tiny", "prompt": prompt, **asked}


def idle_after(stack: Stack, limit_s: float) -> float:
    """Seconds until every engine reports that nothing runs and that it holds no KV; beyond `limit_s` if none does."""
    started = time.monotonic()
    while time.monotonic() - started <= limit_s:
        stats = stack.stats()
        asked = time.monotonic()
        busy = [
            s
            for pool_stats in stats.values()
            for s in pool_stats
            if s["num_requests_running"] or s["num_requests_waiting"] or s["kv_cache_usage"] > 1e-9
        ]
        if not busy:
            return asked - started
        time.sleep(0.05)
    return time.monotonic() - started
