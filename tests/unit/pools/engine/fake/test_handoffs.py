# SPDX-License-Identifier: Apache-2.0
"""Hand-offs between fake engines: events, leases, settling, transfer ids, and the stand-in for the shared tier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pools.config import FakeEngineConfig
from pools.engine.events import EventLog
from pools.engine.fake.engine import FakeEngine
from pools.engine.fake.kv import FakeKV
from pools.engine.fake.text import encode
from pools.engine.fake.tiers import FakeSharedCache
from transport.config import MooncakeConfig, NixlConfig
from transport.digests import chunk_digests
from transport.handoff_params import DO_REMOTE_PREFILL, offer_params
from transport.transports import describe

TRANSPORTS = {"nixl": describe(NixlConfig()), "mooncake": describe(MooncakeConfig(type="mooncake"))}
PROMPT = encode("a prompt of more than two blocks of sixteen tokens each")
FAST = {"itl_ms": 0, "prefill_ms_per_1k_tokens": 0, "transfer_ms_per_1k_tokens": 0}
OFFER = offer_params("g-1")


def held(lease_s: float = 30.0, cache: FakeSharedCache | None = None) -> tuple[FakeKV, list[float], EventLog]:
    now, events = [0.0], EventLog()
    kv = FakeKV(num_blocks=99, block_size=16, lease_s=lease_s, clock=lambda: now[0], events=events, shared_cache=cache)
    return kv, now, events


def said(events: EventLog, *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(event.get(field) for field in ("kind", *fields)) for event in events._events]


@asynccontextmanager
async def pair(transport: str = "nixl", **options: Any) -> AsyncIterator[tuple[FakeEngine, FakeEngine]]:
    config = FakeEngineConfig(type="fake", **FAST)
    roles: tuple[Any, Any] = ("prefill", "decode")
    engines = [FakeEngine(r, r, config, model_id="tiny", transport=TRANSPORTS[transport], **options) for r in roles]
    for engine in engines:
        await engine.start()
    try:
        yield engines[0], engines[1]
    finally:
        for engine in engines:
            await engine.shutdown()


def test_every_hold_ends_once() -> None:
    """Read, settled and expired hand-offs end as that, with what was left of their lease."""
    kv, now, events = held()
    for i in range(3):
        kv.pin(f"g-{i}", PROMPT, keys=[f"r-{i}"])
    now[0] = 10.0
    assert kv.read("r-0") is not None and kv.read("r-0") is None
    kv.settle(["g-1", "g-1", "g-0", "unknown"])
    now[0] = 30.0
    assert kv.usage == 0 and kv.num_expired == 1
    assert kv.read("r-2") is None
    produced, ended = said(events, "id", "tokens")[:3], said(events, "id", "outcome", "lease_left_s", "adopted")[3:]
    assert produced == [("produced", f"g-{i}", len(PROMPT)) for i in range(3)]
    assert ended == [
        ("ended", "g-0", "consumed", 20.0, False),
        ("ended", "g-1", "released", 20.0, False),
        ("ended", "g-2", "expired", None, False),
    ]


def test_settling_may_come_first() -> None:
    """A hand-off that nobody wants ends when it is produced, once."""
    kv, _, events = held()
    kv.settle(["g-1"])
    kv.pin("g-1", PROMPT, keys=["r-1"])
    assert said(events, "outcome") == [("produced", None), ("ended", "released")]
    assert kv.usage == 0


async def test_a_lease_ends_by_itself() -> None:
    """Nobody has to look for the expiry to be told."""
    async with pair(kv_lease_duration_s=0.05) as (prefill, _):
        await prefill.probe(PROMPT, dict(OFFER))
        async with asyncio.timeout(2):
            batch = await prefill.events.read(1, 2)
        assert [(e["kind"], e["outcome"]) for e in batch.events] == [("ended", "expired")]


async def test_a_transfer_id_may_be_asked_for_first() -> None:
    """Mooncake: decode waits for prefill, whichever leg comes first, and prefill's answer names nothing."""
    for decode_first in (True, False):
        async with pair("mooncake") as (prefill, decode):
            assert prefill.kv_source and not decode.kv_source
            offer = {**OFFER, "transfer_id": "g-1"}
            taken = {
                DO_REMOTE_PREFILL: True,
                **prefill.kv_source,
                "transfer_id": "g-1",
            }
            legs = [decode.probe(PROMPT, taken), prefill.probe(PROMPT, offer)]
            tasks = [asyncio.ensure_future(leg) for leg in (legs if decode_first else reversed(legs))]
            await asyncio.sleep(0.05)
            results = await asyncio.gather(*tasks)
            assert [r.kv_transfer_params for r in results] == [None, None]
            assert sorted(r.num_cached_tokens for r in results) == [0, len(PROMPT) - 1]
            assert [e.get("outcome") for e in prefill.events._events] == [None, "consumed"]


async def test_a_transfer_that_never_comes_is_given_up() -> None:
    """Mooncake: decode waits as long as a lease, then computes the prompt itself."""
    async with pair("mooncake", kv_lease_duration_s=0.1) as (prefill, decode):
        taken = {
            DO_REMOTE_PREFILL: True,
            **prefill.kv_source,
            "transfer_id": "g-1",
        }
        result = await asyncio.wait_for(decode.probe(PROMPT, taken), 5)
        assert result.num_cached_tokens == 0
        assert decode.stats().nixl_num_failed_transfers_total == 1


def test_the_sink_keeps_what_nobody_read() -> None:
    """Released and expired KV is kept, consumed KV when the client asked for it, and none that it forbade."""
    cases = [("released", None, True), ("expired", None, True), ("consumed", None, False)]
    cases += [("released", "never", False), ("consumed", "always", True)]
    for outcome, store, kept in cases:
        cache = FakeSharedCache(16)
        kv, now, events = held(cache=cache)
        kv.pin("g-1", PROMPT, keys=["r-1"], salt="s", store=store)
        if outcome == "consumed":
            kv.read("r-1")
        elif outcome == "released":
            kv.settle(["g-1"])
        else:
            now[0] = 30.0
            kv.expire()
        ended, *rescued = list(events._events)[1:]
        assert (ended["outcome"], ended["adopted"]) == (outcome, kept)
        assert cache.found(PROMPT, "s") == (chunk_digests(PROMPT, 16, "s") if kept else [])
        assert [(e["kind"], e["tokens"], e["chunks"]) for e in rescued] == (
            [("rescued", len(PROMPT) // 16 * 16, chunk_digests(PROMPT, 16, "s"))] if kept else []
        )


def test_less_than_a_chunk_is_not_kept() -> None:
    """A prompt without a full chunk is let go."""
    kv, _, events = held(cache=FakeSharedCache(256))
    kv.pin("g-1", PROMPT)
    kv.settle(["g-1"])
    assert said(events, "adopted") == [("produced", None), ("ended", False)]


async def test_kept_chunks_are_loaded() -> None:
    """A later prompt with the same beginning loads it from the tier, on the other pool too, and says which chunks."""
    cache = FakeSharedCache(16)
    async with pair(shared_cache=cache) as (prefill, decode):
        await prefill.probe(PROMPT, dict(OFFER))
        await prefill.settle(["g-1"])
        found = await decode.probe([*PROMPT, 7, 8, 9])
        assert found.num_cached_tokens == len(PROMPT) // 16 * 16
        loaded = list(decode.events._events)
        assert [(e["kind"], e["source"], e["tokens"]) for e in loaded] == [("loaded", "lmcache", 48)]
        assert loaded[0]["chunks"] == chunk_digests(PROMPT, 16)
        await decode.probe([*PROMPT, 7, 8, 9])
        assert len(decode.events._events) == 1
        await decode.probe([1, *PROMPT])
        assert len(decode.events._events) == 1
