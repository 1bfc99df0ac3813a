# SPDX-License-Identifier: Apache-2.0
"""Applications with KV tiers, prompts whose answers no tier may change, and what the engines counted."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from tests.support.answers import Answer, Case, ask_all, difference
from tests.support.stack import BUILD, Stack, aggregated_engine, engine_headers, wait_until
from transport.handoff_params import offer_params

CHUNK = 256
"""Tokens of an LMCache chunk, and two KV blocks of the CPU engine."""
FLOAT32 = {"dtype": "float32"}
"""Computes a prompt eight times as fast as bfloat16 on a CPU without instructions for that."""
WHOLE_PROMPTS = {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192, **FLOAT32}
"""A prompt is computed in one step, here and in the reference. Otherwise its chunks depend on who else is there, and
for a prompt near a tie that decides a token, on one engine as on four.

In bfloat16 such a step of several engines on two cores takes so long that the watchdog takes it for a hang.
"""

Change = Callable[[dict[str, Any]], None]


def tiers(
    *,
    transport: str = "nixl",
    mode: str | None = None,
    cpu_gib: float | None = None,
    sink: str | None = None,
    l1_gib: float = 0.5,
    l2: Sequence[dict[str, Any]] = (),
    blocks: int | None = None,
    lease_s: int = 30,
    whole_prompts: bool = True,
    engine_kwargs: dict[str, Any] | None = None,
    decode_kwargs: dict[str, Any] | None = None,
) -> Change:
    """A change that gives a config these tiers.

    Args:
        sink: None for no shared tier.
        blocks: KV blocks of each engine.
        whole_prompts: False for vLLM's chunked prefill, where float32 leaves no near ties.
    """

    def change(config: dict[str, Any]) -> None:
        args = config["applications"][0]["args"]
        args["transport"] = {"type": transport, "kv_lease_duration_s": lease_s} | ({"mode": mode} if mode else {})
        args["model"]["engine_kwargs"] |= (WHOLE_PROMPTS if whole_prompts else {}) | (engine_kwargs or {})
        if blocks is not None:
            args["model"]["engine_kwargs"]["num_gpu_blocks_override"] = blocks
        if decode_kwargs:
            args["decode"] = {"engine_kwargs": dict(decode_kwargs)}
        if cpu_gib is not None:
            args["offload"] = {"cpu_gib": cpu_gib}
        if sink is not None:
            server = {"type": "managed", "l1_gib": l1_gib, "chunk_tokens": CHUNK, "l2": list(l2)}
            args["shared_cache"] = {"type": "lmcache", "sink": sink, "server": server}

    return change


def prompts(number: int, *, seed: int, longest: int = 3400, shortest: int = 300) -> list[list[int]]:
    """Random prompts, none a prefix of another, spread over the lengths.

    The last part, below a chunk, is below a block as well: a prefix that LMCache holds ends where one that vLLM holds
    ends, so that what is left to compute is the same from any tier.
    """
    chooser = random.Random(seed)
    found = []
    for i in range(number):
        length = shortest + (longest - shortest) * i // max(1, number - 1)
        length = max(CHUNK, length // CHUNK * CHUNK) + 1 + (length * 7) % (CHUNK // 2 - 2)
        found.append([chooser.randrange(20, 1500) for _ in range(length)])
    return found


def full_chunks(prompt: Sequence[int]) -> int:
    """Tokens of a prompt in whole chunks."""
    return len(prompt) // CHUNK * CHUNK


def case_of(name: str, prompt: Sequence[int], *, max_tokens: int = 16, **more: Any) -> Case:
    """A greedy completion over token ids."""
    body = {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }
    return Case(name, "/v1/completions", body)


def asked(url: str, chosen: Sequence[Case], num_clients: int = 1) -> list[Answer]:
    return asyncio.run(ask_all(url, chosen, num_clients=num_clients))


def steady(
    candidates: Sequence[Case], wanted: int, *, engine_kwargs: Mapping[str, Any] | None = None
) -> tuple[list[Case], list[Answer]]:
    """`steady_at` an aggregated engine that is started for it, and computes each prompt whole."""
    with aggregated_engine(name="tiers-reference", engine_kwargs={**WHOLE_PROMPTS, **(engine_kwargs or {})}) as url:
        return steady_at(url, candidates, wanted)


def steady_at(url: str, candidates: Sequence[Case], wanted: int) -> tuple[list[Case], list[Answer]]:
    """Cases whose answer one aggregated engine gives computed, from its prefix cache, and eight at once.

    In bfloat16 a near tie between two tokens goes either way with the shape of a batch, on one engine too; such a
    prompt says nothing about a tier. The choice looks at the reference engine alone.

    Returns:
        `wanted` cases (fewer when there are not so many) and their answers.
    """
    passes = [asked(url, candidates), asked(url, candidates)]
    at_once = [Case(c.name, c.path, {**c.body, "cache_salt": f"at-once-{i}"}) for i, c in enumerate(candidates)]
    passes.append(asked(url, at_once, 8))
    cases, answers = [], []
    for i, case in enumerate(candidates):
        whole, *others = (answers_of[i] for answers_of in passes)
        if len(cases) < wanted and whole.status == 200 and not any(difference(whole, other) for other in others):
            cases.append(case)
            answers.append(whole)
    return cases, answers


def wrong(expected: Sequence[Answer], got: Sequence[Answer]) -> list[str]:
    """What differs, an entry for each wrong answer."""
    found = [difference(one, other) for one, other in zip(expected, got, strict=True)]
    return [problem for problem in found if problem is not None]


def replica_urls(stack: Stack, *pools: str) -> list[str]:
    with stack.client() as client:
        found = client.pools()
    return [r.url for p in found if p.name in pools or not pools for r in p.replicas if r.url]


def reset_caches(stack: Stack) -> None:
    """Empty the prefix cache of every engine. Host memory and the shared tier keep what they have."""
    for url in replica_urls(stack):

        def done(url: str = url) -> bool:
            answer = httpx.post(f"{url}/disagg/v1/reset_prefix_cache", json={}, headers=engine_headers(), timeout=30)
            answer.raise_for_status()
            return bool(answer.json()["reset"])

        wait_until(done, 60, f"the prefix cache at {url} is empty", 0.2)


def counters(stack: Stack, pool: str, name: str) -> dict[str, float]:
    """A Prometheus counter of vLLM's by its labels, summed over the replicas of a pool."""
    found: dict[str, float] = {}
    for url in replica_urls(stack, pool):
        for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
            if line.startswith((name + "{", name + " ")):
                labels = re.sub(r'(engine|model_name)="[^"]*",?', "", line[len(name) : line.rindex(" ")]).strip("{},")
                found[labels] = found.get(labels, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def total(stack: Stack, pool: str, name: str, *having: str) -> float:
    """The sum of a counter over the series whose labels contain every one of `having`."""
    return sum(v for labels, v in counters(stack, pool, name).items() if all(part in labels for part in having))


ENDS = ("consumed", "released", "rescued", "expired", "failed")


def books(stack: Stack) -> dict[str, int]:
    """Number of hand-offs by outcome in the ledger, with `produced`, `reused` and `open`."""
    answer = httpx.get(
        f"{stack.url}/admin/v1/handoffs",
        params={"limit": 0},
        headers={"authorization": f"Bearer {stack.admin_key}"},
        timeout=30,
    )
    answer.raise_for_status()
    listed = answer.json()
    return {word: int(total["count"]) for word, total in listed["totals"].items()} | {"open": int(listed["num_open"])}


def balanced(totals: dict[str, int]) -> bool:
    """produced = consumed + released + rescued + expired + failed, with nothing left open."""
    return totals["produced"] == sum(totals[end] for end in ENDS) and not totals["open"]


def settled_books(stack: Stack, timeout_s: float = 60.0) -> dict[str, int]:
    """The ledger's totals once no hand-off is open, or after `timeout_s` as they are."""
    deadline = time.monotonic() + timeout_s
    totals = books(stack)
    while not balanced(totals) and time.monotonic() < deadline:
        time.sleep(0.25)
        totals = books(stack)
    return totals


def fresh_dir(name: str) -> str:
    """An empty directory below build/."""
    import shutil

    path = BUILD / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return str(path)


def orphan(
    stack: Stack,
    chosen: Sequence[Sequence[int]],
    transport: str = "nixl",
    timeout_s: float = 60.0,
    *,
    settle: bool = True,
) -> list[str]:
    """Prefill prompts for nobody: a leg, then `settle`, as a gateway whose client left; without it their lease ends.

    Returns their ids when all are stored.
    """
    [url] = replica_urls(stack, "prefill")
    ids = [f"orphan-{time.monotonic_ns()}-{i}" for i in range(len(chosen))]
    for handoff_id, prompt in zip(ids, chosen, strict=True):
        params = offer_params(handoff_id)
        if transport == "mooncake":
            params["transfer_id"] = handoff_id
        body = {"model": "tiny", "prompt": list(prompt), "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        calls = [("/v1/completions", {**body, "kv_transfer_params": params})]
        if settle:
            calls.append(("/disagg/v1/settle", {"handoff_ids": [handoff_id]}))
        for path, sent in calls:
            httpx.post(url + path, json=sent, headers=engine_headers(), timeout=60).raise_for_status()

    def stored() -> bool:
        return set(ids) <= {e["id"] for e in events(url) if e["kind"] == "rescued"}

    wait_until(stored, timeout_s, f"{len(ids)} orphaned prompts are stored", 0.25)
    return ids


def events(url: str) -> list[dict[str, Any]]:
    """Every event that an engine still remembers."""
    found: list[dict[str, Any]] = []
    after = 0
    while True:
        query = {"after": after, "wait_s": 0}
        answer = httpx.get(f"{url}/disagg/v1/events", params=query, headers=engine_headers(), timeout=30).json()
        if not answer["events"]:
            return found
        found += answer["events"]
        after = answer["next"]
