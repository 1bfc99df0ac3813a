# SPDX-License-Identifier: Apache-2.0
"""Line 6: a rolling update of everything under load, and each pool made smaller with long streams open."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import yaml

from tests.prove.faults_rows import CONFIG, books_row, chosen_row, count_row, judged, room
from tests.prove.report import Row
from tests.support.answers import Case
from tests.support.faults import Heard, Load, change, listen, reference, replicas, wait_until
from tests.support.serve_control import deploy, open_dashboard, serve_replicas, wait_settled
from tests.support.stack import BUILD, Stack, running

NAME = "prove-faults-drain"
NUM_LONG = 4
LONG_TOKENS = 3600
LONG_S = 60.0
POOLS = ("prefill", "decode")
_LOST = ("released", "expired", "failed")
"""Ends of a hand-off whose KV nobody read and no shared cache keeps."""


def drains() -> list[Row]:
    chosen = reference(tokens=(24, 120))
    with open_dashboard(), running(CONFIG, name=NAME, change=change(2, 2, then=room), timeout_s=420) as stack:
        with Load(stack.url, chosen.known) as load:
            load.wait_for(12)
            began = time.monotonic()
            update = _rolling_update(stack)
            load.wait_for(12)
            smaller = [row for pool in POOLS for row in _scale_down(stack, pool)]
        orphaned = _orphaned(stack)
        books = books_row(6, stack)
    return [
        chosen_row(6, chosen),
        *judged(6, load, marks=[began], at_least=60),
        *update,
        *smaller,
        Row(6, "hand-offs nobody read and nothing keeps", orphaned[1], "0 bytes", orphaned[0] == 0),
        books,
    ]


def _rolling_update(stack: Stack) -> list[Row]:
    """One `serve deploy` of the same file with another engine argument: every deployment gets new replicas."""
    old = _incarnations(stack)
    old_gateways = set(serve_replicas(stack, "gateway"))
    path = BUILD / f"{NAME}.yaml"
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    config["applications"][0]["args"]["model"]["engine_kwargs"]["max_num_seqs"] = 24
    changed = BUILD / f"{NAME}-changed.yaml"
    changed.write_text(yaml.safe_dump(config))
    started = time.monotonic()
    deploy(stack, changed)

    def replaced() -> bool:
        return all(_ready(stack, pool, 2) for pool in POOLS) and not _incarnations(stack) & old

    wait_until(replaced, 900, "both pools are new", 1.0)
    wait_settled(stack)
    took = time.monotonic() - started
    kept = old_gateways & set(serve_replicas(stack, "gateway"))
    return [
        Row(6, "one `serve deploy` of another engine argument", f"{took:.0f} s", "printed", True),
        count_row(6, "gateway replicas that are still the old ones", len(kept), 0),
    ]


def _scale_down(stack: Stack, pool: str) -> list[Row]:
    long = LongStreams(stack.url, f"{pool} 2 to 1")
    long.start()
    wait_until(lambda: long.num_streaming() >= NUM_LONG, 120, f"{NUM_LONG} long streams have begun", 0.1)
    started = time.monotonic()
    with stack.client() as client:
        client.pool(pool).scale(1).wait(timeout_s=600)
    took = time.monotonic() - started
    heard = long.join()
    cut = [h.failed for h in heard if h.failed or len(h.token_ids) != LONG_TOKENS]
    for problem in cut:
        print(f"    {problem}")
    again = LongStreams(stack.url, f"{pool} 2 to 1")
    again.start()
    other = [one.name for one, two in zip(heard, again.join(), strict=True) if one.token_ids != two.token_ids]
    shortest = min((h.ended - h.started for h in heard if h.ended), default=0.0)
    return [
        Row(6, f"{pool} 2 to 1 with {NUM_LONG} long streams open", f"{took:.0f} s", "printed", True),
        count_row(6, f"{pool} 2 to 1: long streams cut", len(cut), 0),
        count_row(6, f"{pool} 2 to 1: long streams with other tokens than alone", len(other), 0),
        Row(
            6,
            f"{pool} 2 to 1: shortest of the long streams",
            f"{shortest:.0f} s",
            f"{LONG_S:g} s",
            shortest >= LONG_S,
        ),
    ]


@dataclass
class LongStreams:
    """A few greedy streams of `LONG_TOKENS` at the same time, in a thread of their own."""

    url: str
    name: str
    heard: list[Heard] = field(default_factory=list)
    _begun: list[Case] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def num_streaming(self) -> int:
        return len(self._begun)

    def join(self) -> list[Heard]:
        """The answers, in the order of their prompts."""
        assert self._thread is not None
        self._thread.join()
        return self.heard

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=300) as client:
            self.heard = list(await asyncio.gather(*(self._one(client, i) for i in range(NUM_LONG))))

    async def _one(self, client: httpx.AsyncClient, number: int) -> Heard:
        body = {
            "model": "tiny",
            "prompt": [40 + (number * 131 + i * 17) % 1400 for i in range(200 + number)],
            "max_tokens": LONG_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        case = Case(f"{self.name} {number}", "/v1/completions", body)
        asking = asyncio.ensure_future(listen(client, self.url, case))
        await asyncio.sleep(1.0)
        self._begun.append(case)
        return await asking


def _orphaned(stack: Stack) -> tuple[int, str]:
    """Bytes, and in words, of what no engine read and no tier has: of this gateway's hand-offs and of others'."""
    total, words = 0, []
    for whose in ("own", "other"):
        answer = httpx.get(
            f"{stack.url}/admin/v1/handoffs",
            params={"gateway": whose, "limit": 0},
            headers={"authorization": f"Bearer {stack.admin_key}"},
            timeout=30,
        )
        answer.raise_for_status()
        totals = answer.json()["totals"]
        total += sum(totals[word]["bytes"] for word in _LOST)
        words += [f"{whose} {word} {totals[word]['count']}" for word in _LOST if totals[word]["count"]]
    return total, f"{total} bytes" + (f" ({', '.join(words)})" if words else "")


def _incarnations(stack: Stack) -> set[str]:
    return {str(replica.incarnation) for pool in POOLS for replica in replicas(stack, pool)}


def _ready(stack: Stack, pool: str, size: int) -> bool:
    with stack.client() as client:
        return client.pool(pool).status().has_size(size)
