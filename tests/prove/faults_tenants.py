# SPDX-License-Identifier: Apache-2.0
"""Line 9: no cache hit across two API keys, in any tier, by what engines count and by time; the same key gets them.

One application with host memory, another with LMCache, so that it is known which tier answered. Alice asks prompts.
Then, in turns, she asks a new one (cold), Bob asks hers (the other key), and she asks hers again (the same key).
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.prove.report import ROOT, Row
from tests.prove.tiers_rescue import stored_bytes
from tests.support.stack import BUILD, Stack, running
from tests.support.tiers import Change, full_chunks, prompts, reset_caches, tiers

LINE = 9
CONFIG = ROOT / "configs" / "quickstart.yaml"
TOKENS = 3400
EACH = 10
"""Prompts of each tier, each asked cold, by the other key and by the same one."""
CPU_GIB = 0.5
ALIKE = (0.8, 1.25)
"""Bounds of the other key's median time against a cold prompt's: the spread of medians on a busy machine."""
FASTER = 0.75
SETTLED_S = 2.0

Counter = str
LOADED: dict[str, Counter | None] = {
    "prefix cache": None,
    "host memory": "prompt_tokens_host_total",
    "LMCache": "prompt_tokens_external_total",
}
"""The engines' counter of prompt tokens that came from a tier."""


@dataclass
class Seen:
    """What requests of one kind showed."""

    ttft_s: list[float] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    """`usage.prompt_tokens_details.cached_tokens`."""
    computed: list[int] = field(default_factory=list)
    """Prompt tokens that the prefill engine computed."""
    loaded: int = 0
    """Prompt tokens that came from the tier, in either pool."""


@dataclass(frozen=True)
class Keys:
    """Two tenants' keys and the file that holds them."""

    file: Path
    alice: str
    bob: str


def tenants() -> list[Row]:
    keys = write_keys(BUILD / "prove-tenants-keys")
    rows = []
    with running(CONFIG, name="prove-tenants-offload", change=with_keys(keys, tiers(cpu_gib=CPU_GIB))) as stack:
        rows += refused(stack, keys)
        rows += judged("prefix cache", measured(stack, keys, "prefix cache", seed=91, before=lambda: None))
        rows += judged("host memory", measured(stack, keys, "host memory", seed=92, before=lambda: forget(stack)))
    change = with_keys(keys, tiers(sink="write_through", l1_gib=1.0))
    with running(CONFIG, name="prove-tenants-lmcache", change=change) as stack:
        rows += judged("LMCache", measured(stack, keys, "LMCache", seed=93, before=lambda: stored_and_forgot(stack)))
    return rows


def write_keys(file: Path) -> Keys:
    alice, bob = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    file.parent.mkdir(exist_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as output:
        output.write(f"alice:{alice}\nbob:{bob}\n")
    return Keys(file, alice, bob)


def with_keys(keys: Keys, change: Change) -> Change:
    def changed(config: dict[str, Any]) -> None:
        change(config)
        args = config["applications"][0]["args"]
        args["gateway"]["api_keys"] = {"type": "file", "path": str(keys.file)}
        args["model"]["engine_kwargs"]["enable_prompt_tokens_details"] = True

    return changed


def refused(stack: Stack, keys: Keys) -> list[Row]:
    """Without a key, with a wrong one and with the admin key nothing is answered; an engine answers no client."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    url = f"{stack.url}/v1/completions"
    wrong: Sequence[dict[str, str]] = (
        {},
        {"authorization": f"Bearer {keys.alice[:-1]}"},
        {"authorization": f"Bearer {stack.admin_key}"},
    )
    statuses = [httpx.post(url, json=body, headers=headers, timeout=30).status_code for headers in wrong]
    right = httpx.post(url, json=body, headers=bearer(keys.alice), timeout=30).status_code
    with stack.client() as client:
        engines = [replica.url for pool in client.pools() for replica in pool.replicas]
    for engine in engines:
        for headers in ({}, bearer(keys.alice)):
            answer = httpx.post(f"{engine}/v1/completions", json=body, headers=headers, timeout=30)
            statuses.append(answer.status_code)
    return [
        Row(LINE, "no key, a wrong one; engines without theirs", str(statuses), "401", set(statuses) == {401}),
        Row(LINE, "a right key", str(right), "200", right == 200),
    ]


def measured(stack: Stack, keys: Keys, tier: str, *, seed: int, before: Callable[[], None]) -> dict[str, Seen]:
    """Each kind of request over `EACH` prompts. `before` runs between Alice's first requests and the measured ones."""
    warm, hers, cold = (
        prompts(number, seed=seed + shift, shortest=TOKENS, longest=TOKENS)
        for number, shift in ((3, 1000), (EACH, 2000), (EACH, 3000))
    )
    nobody = Seen()
    with httpx.Client(base_url=stack.url, timeout=120) as client:
        for prompt in warm:
            ask(client, stack, keys.bob, prompt, nobody, None)
        for prompt in hers:
            ask(client, stack, keys.alice, prompt, nobody, None)
        before()
        found = {kind: Seen() for kind in ("cold", "other", "same")}
        for number in range(EACH):
            asked = [
                ("cold", keys.alice, cold[number]),
                ("other", keys.bob, hers[number]),
                ("same", keys.alice, hers[number]),
            ]
            for kind, key, prompt in asked[number % 3 :] + asked[: number % 3]:
                ask(client, stack, key, prompt, found[kind], LOADED[tier])
    return found


def ask(
    client: httpx.Client, stack: Stack, key: str, prompt: Sequence[int], seen: Seen, counter: Counter | None
) -> None:
    """One streamed request, and what the engines counted meanwhile; nobody else asks."""
    before = counted(stack, counter)
    body = {"model": "tiny", "prompt": list(prompt), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    started = time.perf_counter()
    first, usage = None, None
    with client.stream("POST", "/v1/completions", json=body, headers=bearer(key)) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter()
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(line[:300])
            usage = event.get("usage") or usage
    if answer.status_code != 200 or first is None or usage is None:
        raise RuntimeError(f"status {answer.status_code}, usage {usage}")
    after = counted(stack, counter)
    seen.ttft_s.append(first - started)
    seen.cached.append(int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0))
    seen.computed.append(after[0] - before[0])
    seen.loaded += after[1] - before[1]


def counted(stack: Stack, counter: Counter | None) -> tuple[int, int]:
    """Prompt tokens that prefill engines computed, and that all engines loaded from the tier, since they began."""
    stats = stack.stats()
    computed = sum(s["prompt_tokens_computed_total"] for s in stats["prefill"])
    loaded = sum(s[counter] for pool in stats.values() for s in pool) if counter else 0
    return computed, loaded


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def forget(stack: Stack) -> None:
    """Empty the engines' own memory, once what the tier below takes has gone there."""
    time.sleep(SETTLED_S)
    reset_caches(stack)


def stored_and_forgot(stack: Stack) -> None:
    """The same, once the LMCache server takes nothing more."""
    size, since = stored_bytes(stack), time.monotonic()
    while time.monotonic() - since < SETTLED_S:
        time.sleep(0.25)
        latest = stored_bytes(stack)
        if latest != size:
            size, since = latest, time.monotonic()
    reset_caches(stack)


def judged(tier: str, found: dict[str, Seen]) -> list[Row]:
    cold, other, same = (found[kind] for kind in ("cold", "other", "same"))
    length = len(prompts(1, seed=0, shortest=TOKENS, longest=TOKENS)[0])
    chunks = full_chunks(range(length))
    p50 = {kind: statistics.median(seen.ttft_s) for kind, seen in found.items()}
    against_cold = p50["other"] / p50["cold"]
    faster = p50["same"] / p50["cold"]
    rows = [
        Row(
            LINE,
            f"{tier}: cached tokens told to the other key, most",
            f"{max(other.cached)} of {length}",
            "0",
            not any(other.cached),
        ),
        Row(
            LINE,
            f"{tier}: prompt tokens computed for the other key",
            f"{sum(other.computed)} of {EACH * length}",
            "all, and health probes' few",
            # The engine counts the tokens of its health probes, too, when it was idle for a moment.
            all(computed >= length for computed in other.computed),
        ),
        Row(
            LINE,
            f"{tier}: cached tokens told to the same key, least",
            f"{min(same.cached)} of {length}",
            f"at least {chunks}, the whole chunks",
            min(same.cached) >= chunks,
        ),
        Row(
            LINE,
            f"{tier}: TTFT p50, other key / cold prompt",
            f"{1e3 * p50['other']:.0f} / {1e3 * p50['cold']:.0f} ms = {against_cold:.2f}",
            f"{ALIKE[0]:g} to {ALIKE[1]:g}",
            ALIKE[0] <= against_cold <= ALIKE[1],
        ),
        Row(
            LINE,
            f"{tier}: TTFT p50, same key / cold prompt",
            f"{1e3 * p50['same']:.0f} / {1e3 * p50['cold']:.0f} ms = {faster:.2f}",
            f"at most {FASTER:g}",
            faster <= FASTER,
        ),
    ]
    if LOADED[tier] is not None:
        rows.append(
            Row(
                LINE,
                f"{tier}: tokens loaded for cold, other key, same key",
                f"{cold.loaded}, {other.loaded}, {same.loaded}",
                f"0, 0, at least {EACH * chunks}",
                cold.loaded == other.loaded == 0 and same.loaded >= EACH * chunks,
            )
        )
    return rows
