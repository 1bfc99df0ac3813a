# SPDX-License-Identifier: Apache-2.0
"""Line 5: the LMCache server is killed under load. Requests lose a cache and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx
import psutil

from tests.prove.report import ROOT, Row
from tests.support.answers import Answer, Case, ask, difference
from tests.support.stack import Stack, running
from tests.support.tiers import case_of, events, prompts, replica_urls, steady, tiers

CONFIG = ROOT / "configs" / "quickstart.yaml"
CLIENTS = 8
BLOCKS = 96
NUM_PROMPTS = 24
BEFORE_S = 15.0
AFTER_S = 60.0
BACK_S = 30.0


def server_dies(before_s: float = BEFORE_S, after_s: float = AFTER_S) -> list[Row]:
    chosen, expected = steady([case_of(f"p{i}", p) for i, p in enumerate(prompts(40, seed=51))], NUM_PROMPTS)
    change = tiers(sink="write_through", l1_gib=0.5, blocks=BLOCKS)
    with running(CONFIG, name="prove-tiers-server", change=change) as stack:
        engines = {s["incarnation"] for pool in stack.stats().values() for s in pool}
        return asyncio.run(_under_load(stack, chosen, expected, engines, before_s, after_s))


async def _under_load(
    stack: Stack, chosen: list[Case], expected: list[Answer], engines: set[str], before_s: float, after_s: float
) -> list[Row]:
    stop = asyncio.Event()
    failed: list[str] = []
    wrong: list[str] = []
    num_asked = 0

    async def client_loop(client: httpx.AsyncClient, start: int) -> None:
        nonlocal num_asked
        turn = start
        while not stop.is_set():
            which = turn % len(chosen)
            turn += 1
            num_asked += 1
            try:
                got = await ask(client, stack.url, chosen[which])
            except httpx.HTTPError as exc:
                failed.append(repr(exc))
                continue
            if got.status != 200 or got.error:
                failed.append(f"{got.status} {got.error}")
            elif (problem := difference(expected[which], got)) is not None:
                wrong.append(problem)

    [url] = replica_urls(stack, "prefill")
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=CLIENTS)) as client:
        load = [asyncio.create_task(client_loop(client, i * 3)) for i in range(CLIENTS)]
        await asyncio.sleep(before_s)
        hits_before = _loads(url)
        server = server_process(stack)
        os.kill(server.pid, signal.SIGKILL)
        killed_at = time.time()
        restarted_after = await asyncio.to_thread(_restarted, stack, server.pid)
        restarted_at = time.time()
        hits_after = None
        while time.time() < restarted_at + after_s and hits_after is None:
            await asyncio.sleep(0.5)
            seen = [e["at"] for e in await asyncio.to_thread(events, url) if _is_load(e) and e["at"] > restarted_at]
            hits_after = min(seen) - restarted_at if seen else None
        await asyncio.sleep(max(0.0, killed_at + 30 - time.time()))
        stop.set()
        await asyncio.gather(*load)
    same = {s["incarnation"] for pool in stack.stats().values() for s in pool} == engines
    for problem in (failed + wrong)[:10]:
        print(f"    {problem[:300]}")
    back = "never" if hits_after is None else f"{hits_after:.1f} s"
    return [
        Row(5, f"requests failed, {CLIENTS} clients", f"{len(failed)} of {num_asked}", "0", not failed),
        Row(5, "answers with wrong tokens", f"{len(wrong)} of {num_asked}", "0", not wrong),
        Row(5, "engines restarted", "none" if same else "some", "none", same),
        Row(5, "loads from LMCache before it was killed", str(hits_before), "more than 0", hits_before > 0),
        Row(5, "LMCache server answers again after", f"{restarted_after:.1f} s", "printed", True),
        Row(
            5,
            "stored and loaded again, after its restart",
            back,
            f"within {BACK_S:g} s",
            hits_after is not None and hits_after <= BACK_S,
        ),
    ]


def server_process(stack: Stack) -> psutil.Process:
    """The `lmcache server` of an application, found by the port of its HTTP address."""
    port = lmcache_http_url(stack).rsplit(":", 1)[1]
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "--http-port" in command and command[command.index("--http-port") + 1] == port:
            return process
    raise LookupError(f"no process has --http-port {port}")


def lmcache_http_url(stack: Stack) -> str:
    with stack.client() as client:
        urls = {r.lmcache_http_url for p in client.pools() for r in p.replicas}
    [url] = urls - {None}
    return str(url)


def _restarted(stack: Stack, old_pid: int) -> float:
    """Seconds until another server process answers at the same address."""
    started = time.monotonic()
    url = lmcache_http_url(stack)
    while time.monotonic() - started < 120:
        try:
            if server_process(stack).pid != old_pid and httpx.get(f"{url}/healthcheck", timeout=2).status_code == 200:
                return time.monotonic() - started
        except (LookupError, httpx.HTTPError):
            pass
        time.sleep(0.2)
    raise TimeoutError("the LMCache server did not come back within 120 s")


def _is_load(event: dict[str, object]) -> bool:
    return event["kind"] == "loaded" and event["source"] == "lmcache"


def _loads(url: str) -> int:
    return sum(_is_load(e) for e in events(url))
