# SPDX-License-Identifier: Apache-2.0
"""Line 3: sixty hand-offs that no decode engine takes, in three ways, and what becomes of their KV."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import time
from typing import Any

import httpx
import psutil

from tests.prove.report import ROOT, Row
from tests.prove.tiers_offload import passes_of
from tests.prove.tiers_server import lmcache_http_url
from tests.support.answers import Case
from tests.support.stack import Stack, is_warm, running, wait_until
from tests.support.tiers import (
    asked,
    balanced,
    books,
    case_of,
    events,
    full_chunks,
    prompts,
    replica_urls,
    reset_caches,
    settled_books,
    tiers,
)

CONFIG = ROOT / "configs" / "quickstart.yaml"
EACH = 20
LEASE_S = 10
NUM_CONSUMED = 200
SHARE = 0.95


def nothing_is_wasted(each: int = EACH, num_consumed: int = NUM_CONSUMED) -> list[Row]:
    # One sequence at a time on decode: what comes after the first waits in the engine's queue, prefilled and unread.
    change = tiers(sink="unused", lease_s=LEASE_S, l1_gib=1.0, decode_kwargs={"max_num_seqs": 1})
    lost = prompts(3 * each, seed=34, shortest=512, longest=2048)
    by_kind = {"client left": lost[:each], "decode killed": lost[each : 2 * each], "lease ran out": lost[2 * each :]}
    rows = []
    with running(CONFIG, name="prove-tiers-rescue", change=change) as stack:
        stored_before = stored_bytes(stack)
        consumed = [
            case_of(f"c{i}", p, max_tokens=2) for i, p in enumerate(prompts(num_consumed, seed=35, longest=600))
        ]
        asked(stack.url, consumed, 4)
        totals = settled_books(stack)
        grown = stored_bytes(stack) - stored_before
        rows.append(
            Row(3, f"{num_consumed} consumed hand-offs: bytes stored in LMCache", f"{grown:.0f}", "0", grown == 0)
        )
        rows.append(
            Row(
                3,
                "consumed, by the ledger",
                str(totals["consumed"]),
                f"{num_consumed}",
                totals["consumed"] == num_consumed,
            )
        )
        leave(stack, by_kind["client left"])
        after_left = settled_books(stack)
        hang_and_kill(stack, by_kind["lease ran out"], by_kind["decode killed"])
        totals = settled_books(stack)
        wait_until(lambda: is_warm(stack.url), 180, "the decode replica is replaced and warm", 0.5)
        print(f"    after the clients that left: {after_left}; after all: {totals}")
        rows.append(
            Row(3, "rescued, by the ledger", str(totals["rescued"]), str(3 * each), totals["rescued"] == 3 * each)
        )
        reset_caches(stack)
        computed = statistics.median(passes_of(stack, prompts(3 * each, seed=36, shortest=512, longest=2048)))
        reset_caches(stack)
        [url] = replica_urls(stack, "prefill")
        mark = len(events(url))
        from_cache = statistics.median(passes_of(stack, lost))
        loaded = sum(e["tokens"] for e in events(url)[mark:] if e["kind"] == "loaded" and e["source"] == "lmcache")
        wanted = sum(full_chunks(p) for p in lost)
        totals = settled_books(stack)
    share = loaded / wanted
    figure = f"{1e3 * computed:.0f} / {1e3 * from_cache:.0f} ms = {computed / from_cache:.2f}"
    rows += [
        Row(
            3,
            "prompt tokens in full chunks that came from LMCache",
            f"{loaded} of {wanted} = {100 * share:.1f} %",
            f"at least {100 * SHARE:g} %",
            share >= SHARE,
        ),
        Row(3, "TTFT p50, computed / from LMCache", figure, "printed", from_cache > 0),
        Row(3, "re-used, by the ledger", str(totals["reused"]), str(3 * each), totals["reused"] == 3 * each),
        Row(
            3,
            "the books balance",
            ", ".join(f"{k} {v}" for k, v in totals.items()),
            "produced = sum of ends",
            balanced(totals),
        ),
    ]
    return rows


def stored_bytes(stack: Stack) -> float:
    """Bytes in the LMCache server's memory, by its own account."""
    return l1_bytes(httpx.get(f"{lmcache_http_url(stack)}/status", timeout=30).json())


def l1_bytes(status: Any) -> float:
    """Bytes that an LMCache server's memory holds, from its `/status` (LMCache 0.5 `l1_manager.report_status`)."""
    return sum(float(l1["memory_used_bytes"]) for l1 in status["storage_manager"]["l1_managers"].values())


def leave(stack: Stack, chosen: list[list[int]]) -> None:
    """Clients that leave once their prompt is prefilled, while decode has not begun to read it."""

    async def run() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            occupied = asyncio.create_task(_occupy(client, stack.url))
            await _busy(stack)
            for prompt in chosen:
                already = books(stack)["produced"]
                leaver = asyncio.create_task(_send(client, stack.url, case_of("leaver", prompt)))
                await _produced(stack, already + 1)
                leaver.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await leaver
            occupied.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await occupied

    asyncio.run(run())


def hang_and_kill(stack: Stack, expire: list[list[int]], kill: list[list[int]]) -> None:
    """A decode replica that hangs until leases run out, and is killed while further hand-offs wait for it."""
    with stack.client() as client:
        [victim] = client.pool("decode").status().replicas
    assert victim.pid is not None
    family = [psutil.Process(victim.pid), *psutil.Process(victim.pid).children(recursive=True)]

    async def run() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            for process in family:
                process.suspend()
            already, rescued = (books(stack)[name] for name in ("produced", "rescued"))
            expiring = [asyncio.create_task(_send(client, stack.url, case_of("expires", p))) for p in expire]
            await _produced(stack, already + len(expire))
            await _until(lambda: books(stack)["rescued"] >= rescued + len(expire), LEASE_S + 20)
            # Gateways have taken it out by now. It comes back, and hangs anew.
            for process in family:
                process.resume()
            await asyncio.gather(*expiring, return_exceptions=True)
            await _until(lambda: is_warm(stack.url), 60)
            for process in family:
                process.suspend()
            already = books(stack)["produced"]
            dying = [asyncio.create_task(_send(client, stack.url, case_of("dies", p))) for p in kill]
            await _produced(stack, already + len(kill))
            os.kill(victim.pid, signal.SIGKILL)
            for process in family[1:]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            await asyncio.gather(*dying, return_exceptions=True)

    asyncio.run(run())


async def _send(client: httpx.AsyncClient, url: str, case: Case) -> int:
    return (await client.post(url + case.path, json=case.body)).status_code


async def _occupy(client: httpx.AsyncClient, url: str) -> None:
    """One stream after the other, so that decode's only sequence is taken."""
    number = 0
    while True:
        number += 1
        await _send(client, url, case_of("occupies", [40 + number % 1000] * 20, max_tokens=3500))


async def _busy(stack: Stack) -> None:
    await _until(lambda: stack.stats()["decode"][0]["num_requests_running"] >= 1, 30)


async def _produced(stack: Stack, number: int) -> None:
    await _until(lambda: books(stack)["produced"] >= number, 30)


async def _until(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline:
            raise TimeoutError("the application did not get there")
        await asyncio.sleep(0.02)
