# SPDX-License-Identifier: Apache-2.0
"""Line 8: each pool goes from one replica to two and back while clients stream; nothing is cut, nothing restarts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from tests.prove.report import ROOT, Row
from tests.support.stack import Stack, running

CONFIG = ROOT / "configs" / "quickstart.yaml"
NUM_CLIENTS = 4
ANSWER_S = 30.0


@dataclass
class Load:
    """Clients that stream long answers, one after another, until told to stop."""

    url: str
    max_tokens: int
    failed: list[str] = field(default_factory=list)
    finished: int = 0
    replicas: set[str] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def stop(self) -> None:
        """Let the answers that are running finish."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=300) as client:
            await asyncio.gather(*(self._client(client, i) for i in range(NUM_CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            prompt = [30 + (number * 97 + turn * 31 + i * 7) % 1400 for i in range(200)]
            problem = await self._one(client, {"model": "tiny", "prompt": prompt, "max_tokens": self.max_tokens})
            if problem is None:
                self.finished += 1
            else:
                self.failed.append(problem)

    async def _one(self, client: httpx.AsyncClient, body: dict[str, object]) -> str | None:
        body = {**body, "stream": True, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
        tokens, done = 0, False
        try:
            async with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    return f"status {response.status_code}"
                self.replicas |= {response.headers["x-disagg-prefill"], response.headers["x-disagg-decode"]}
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data: "):
                        if '"error"' in line:
                            return line[:200]
                        tokens += line.count('"token_ids":[')
        except httpx.HTTPError as exc:
            return f"{type(exc).__name__}: {exc}"
        return None if done and tokens else f"cut after {tokens} events, [DONE] {done}"


def scale() -> list[Row]:
    with running(CONFIG, name="prove-scale") as stack:
        load = Load(stack.url, _tokens_for(stack, ANSWER_S))
        load.start()
        time.sleep(5)
        try:
            rows = [
                *_there_and_back(stack, load, "decode", "SDK", _by_sdk),
                *_there_and_back(stack, load, "prefill", "CLI", _by_cli),
            ]
        finally:
            load.stop()
    for problem in load.failed:
        print(f"    {problem}")
    rows.append(
        Row(
            8,
            "answers failed or cut meanwhile",
            f"{len(load.failed)} of {load.finished + len(load.failed)}",
            "0",
            not load.failed,
        )
    )
    return rows


def _tokens_for(stack: Stack, seconds: float) -> int:
    """Number of tokens that four clients at once take about `seconds` for, as measured here."""
    probe = Load(stack.url, 100)
    probe._stop.set()

    async def four() -> float:
        async with httpx.AsyncClient(timeout=120) as client:
            started = time.monotonic()
            bodies = [{"model": "tiny", "prompt": [40 + i] * 200, "max_tokens": 200} for i in range(NUM_CLIENTS)]
            problems = await asyncio.gather(*(probe._one(client, body) for body in bodies))
            assert not any(problems), problems
            return (time.monotonic() - started) / 200

    return max(200, min(3600, int(seconds / asyncio.run(four()))))


Scale = Callable[[Stack, str, int], None]


def _by_sdk(stack: Stack, pool: str, size: int) -> None:
    with stack.client() as client:
        client.pool(pool).scale(size).wait(timeout_s=300)


def _by_cli(stack: Stack, pool: str, size: int) -> None:
    command = [sys.executable, "-m", "disagg.cli.main", "scale", pool, str(size), "--url", stack.url]
    env = {**os.environ, "DISAGG_API_KEY": stack.admin_key, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=env, cwd=ROOT, timeout=400, stdout=subprocess.DEVNULL)


def _incarnations(stack: Stack) -> dict[str, str]:
    with stack.client() as client:
        return {r.replica_id: str(r.incarnation) for pool in client.pools() for r in pool.replicas}


def _there_and_back(stack: Stack, load: Load, pool: str, by: str, change: Scale) -> list[Row]:
    before = _incarnations(stack)
    started = time.monotonic()
    change(stack, pool, 2)
    up_s = time.monotonic() - started
    grown = _incarnations(stack)
    added = grown.keys() - before.keys()
    untouched = all(grown.get(replica) == incarnation for replica, incarnation in before.items())
    deadline = time.monotonic() + 2 * ANSWER_S + 30
    while not added & load.replicas and time.monotonic() < deadline:
        time.sleep(0.5)
    served = bool(added & load.replicas)
    started = time.monotonic()
    change(stack, pool, 1)
    down_s = time.monotonic() - started
    shrunk = _incarnations(stack)
    untouched = untouched and all(grown.get(replica) == incarnation for replica, incarnation in shrunk.items())
    return [
        Row(8, f"{pool} 1 to 2 by {by}: ready, and back to 1", f"{up_s:.1f} s, {down_s:.1f} s", "printed", True),
        Row(8, f"{pool}: no other replica restarted", "none" if untouched else "some", "none", untouched),
        Row(8, f"{pool}: the new replica serves", "yes" if served else "no", "yes", served),
    ]
