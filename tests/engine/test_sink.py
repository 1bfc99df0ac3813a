# SPDX-License-Identifier: Apache-2.0
"""What a prefill engine stores in a real LMCache server, what it does not, and what a dead server costs it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.sink_stack import CHUNK, TOKEN_BYTES, Engine, Server, engine, lmcache_server, prompt
from tests.support.stack import side_by_side
from transport.handoff_params import HANDOFF_ID, NOT_STORED, STORE


@dataclass
class Tier:
    server: Server
    prefill: Engine
    decode: Engine


@pytest.fixture(scope="module")
def tier() -> Iterator[Tier]:
    """A server, and a pair of engines with the sink `unused`."""
    with (
        lmcache_server() as server,
        side_by_side(engine("prefill", server, "unused", lease_s=8), engine("decode", server, "unused", lease_s=8)) as (
            prefill,
            decode,
        ),
    ):
        yield Tier(server, prefill, decode)


def _consume(tier: Tier, tokens: list[int], handoff_id: str, **params: str) -> None:
    given = tier.prefill.prefill(tokens, handoff_id, **params)
    tier.decode.tokens(tokens, kv_transfer_params={**given, HANDOFF_ID: handoff_id})


def test_consumed_hand_offs_store_nothing(tier: Tier) -> None:
    """Twenty hand-offs that a decode engine reads leave not one byte on the server."""
    before = tier.server.stored_bytes()
    for i in range(20):
        _consume(tier, prompt(100 + i, 900), f"read-{i}")
    ends = [tier.prefill.end_of(f"read-{i}") for i in range(20)]
    assert {(e["kind"], e["outcome"]) for e in ends} == {("ended", "consumed")}
    assert tier.server.stored_bytes() == before
    assert tier.prefill.frees_all()


def test_an_unused_hand_off_is_rescued_and_loaded(tier: Tier) -> None:
    """A settled hand-off is stored, and either pool then loads it instead of computing it, token for token the same."""
    tokens = prompt(1, 1000)
    expected = tier.decode.tokens(tokens)
    tier.decode.forget_prefixes()
    before = tier.server.stored_bytes()
    tier.prefill.prefill(tokens, "unused-1")
    tier.prefill.settle("unused-1")
    rescued = tier.prefill.end_of("unused-1")
    full = len(tokens) // CHUNK * CHUNK
    assert (rescued["kind"], rescued["tokens"], rescued["bytes"]) == ("rescued", full, full * TOKEN_BYTES)
    assert len(rescued["chunks"]) == full // CHUNK
    assert tier.server.stored_bytes() - before == full * TOKEN_BYTES
    assert tier.prefill.frees_all()
    for one in (tier.prefill, tier.decode):
        one.forget_prefixes()
        assert one.tokens(tokens) == expected
        loaded = one.event(kind="loaded", source="lmcache", tokens=full)
        assert loaded["chunks"] == rescued["chunks"]


def test_an_expired_hand_off_is_rescued(tier: Tier) -> None:
    """One that nobody settles is stored when its lease ends, on an engine without any other work."""
    tier.prefill.prefill(prompt(2, 700), "expired-1")
    assert tier.prefill.end_of("expired-1")["kind"] == "rescued"
    assert tier.prefill.event(kind="ended", id="expired-1")["outcome"] == "expired"
    assert tier.prefill.frees_all()


def test_the_client_may_decide(tier: Tier) -> None:
    """`never` is not stored though unused, `always` is stored though consumed."""
    before = tier.server.stored_bytes()
    tier.prefill.prefill(prompt(3, 700), "never-1", **NOT_STORED)
    tier.prefill.settle("never-1")
    assert tier.prefill.end_of("never-1")["outcome"] == "released"
    assert tier.server.stored_bytes() == before
    _consume(tier, prompt(4, 700), "always-1", **{STORE: "always"})
    assert tier.prefill.end_of("always-1")["kind"] == "rescued"
    assert tier.prefill.event(kind="ended", id="always-1")["outcome"] == "consumed"


def test_less_than_a_chunk_is_not_adopted(tier: Tier) -> None:
    """There is nothing to store of a short prompt, nor of one that the tier has already."""
    tier.prefill.prefill(prompt(5, CHUNK - 1), "short-1")
    tier.prefill.settle("short-1")
    assert tier.prefill.end_of("short-1")["outcome"] == "released"
    for name in ("twice-1", "twice-2"):
        tier.prefill.prefill(prompt(6, 700), name)
        tier.prefill.settle(name)
        end = tier.prefill.end_of(name)
    assert (end["kind"], end["outcome"]) == ("ended", "released")


def test_a_dead_server_costs_the_rescues_and_nothing_else(tier: Tier) -> None:
    """Killed with a rescue ahead: it fails, the engines answer, nothing stays pinned; restarted, rescues work again."""
    tier.prefill.prefill(prompt(10, 700), "killed-1")
    tier.server.kill()
    try:
        tier.prefill.settle("killed-1")
        assert tier.prefill.end_of("killed-1")["kind"] == "rescue_failed"
        expected = tier.prefill.tokens(prompt(11, 700))
        assert tier.decode.tokens(prompt(11, 700)) == expected
        tier.prefill.event(kind="tier_degraded", tier="lmcache")
        tier.prefill.prefill(prompt(12, 700), "killed-2")
        tier.prefill.settle("killed-2")
        assert tier.prefill.end_of("killed-2")["reason"] == "LMCache does not answer"
        assert tier.prefill.frees_all()
        assert len([e for e in tier.prefill.events() if e["kind"] == "tier_degraded"]) == 1
    finally:
        tier.server.start()
    tokens = _rescued_within(30, tier, seed=20)
    tier.prefill.event(kind="tier_recovered", tier="lmcache")
    expected = tier.prefill.tokens(tokens)
    tier.decode.forget_prefixes()
    assert tier.decode.tokens(tokens) == expected
    assert tier.prefill.frees_all()


def _rescued_within(limit_s: float, tier: Tier, seed: int) -> list[int]:
    """The prompt of the first hand-off that is rescued, tried again and again."""
    started = time.monotonic()
    for i in range(100):
        name, tokens = f"again-{seed}-{i}", prompt(seed + i, 700)
        tier.prefill.prefill(tokens, name)
        tier.prefill.settle(name)
        if tier.prefill.end_of(name)["kind"] == "rescued":
            break
        time.sleep(0.3)
    assert time.monotonic() - started < limit_s
    return tokens


def test_a_server_that_hangs_costs_no_more_than_a_dead_one(tier: Tier) -> None:
    """Frozen with a rescue ahead: requests on both engines are answered within seconds, and it recovers."""
    tokens = prompt(300, 700)
    expected = tier.prefill.tokens(tokens)
    tier.prefill.prefill(prompt(301, 700), "frozen-1")
    tier.server.freeze(True)
    try:
        tier.prefill.settle("frozen-1")
        for one in (tier.prefill, tier.decode):
            one.forget_prefixes()
            started = time.monotonic()
            assert one.tokens(tokens) == expected
            assert time.monotonic() - started < 10
        assert tier.prefill.end_of("frozen-1")["kind"] == "rescue_failed"
        assert tier.prefill.frees_all()
    finally:
        tier.server.freeze(False)
    _rescued_within(30, tier, seed=310)


def test_a_server_that_was_never_missed(tier: Tier) -> None:
    """One that forgets its engines without missing a heartbeat costs one rescue, not all that follow."""
    tier.prefill.prefill(prompt(150, 700), "before-restart")
    tier.server.forget_engines()
    ends = []
    for i in range(20):
        tier.prefill.prefill(prompt(160 + i, 700), f"forgotten-{i}")
        tier.prefill.settle(f"forgotten-{i}")
        ends.append(tier.prefill.end_of(f"forgotten-{i}")["kind"])
        if ends[-1] == "rescued":
            break
        time.sleep(0.5)
    assert ends[0] == "rescue_failed" and ends[-1] == "rescued"
    assert tier.prefill.frees_all()


@pytest.mark.parametrize("sink", ["evicted", "write_through", "off"])
def test_the_other_sinks(sink: str) -> None:
    """`never` stores nothing with any of them; `always` is stored at once with `evicted`, and ignored with `off`.

    With `write_through` a prompt of several steps is several stores.
    """
    steps = {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK} if sink == "write_through" else None
    with lmcache_server() as server, engine("prefill", server, sink, engine_kwargs=steps) as prefill:  # type: ignore[arg-type]
        full = 700 // CHUNK * CHUNK * TOKEN_BYTES
        for name, params, stored in (
            ("never", NOT_STORED, 0),
            ("plain", {}, full if sink == "write_through" else 0),
            ("always", {STORE: "always"}, 0 if sink == "off" else full),
        ):
            before = server.stored_bytes()
            prefill.prefill(prompt(sum(map(ord, name)), 700), name, **params)
            prefill.settle(name)
            end = prefill.end_of(name)
            assert end["kind"] == ("rescued" if (sink, name) == ("evicted", "always") else "ended")
            time.sleep(0.5)
            assert server.stored_bytes() - before == stored, name
        assert prefill.frees_all()
        if sink == "write_through":
            tokens = prompt(sum(map(ord, "plain")), 700)
            expected = prefill.tokens(tokens)
            prefill.forget_prefixes()
            assert prefill.tokens(tokens) == expected
            prefill.event(kind="loaded", source="lmcache", tokens=700 // CHUNK * CHUNK)
            assert prefill.frees_all()
        server.kill()
        prefill.prefill(prompt(400, 700), "dead")
        prefill.settle("dead")
        assert prefill.end_of("dead")["kind"] == "ended"
        prefill.forget_prefixes()
        prefill.tokens(prompt(sum(map(ord, "always")), 700))
        assert prefill.frees_all()


def test_two_ranks() -> None:
    """Each rank stores its share, the rescue is over when both have, and both find theirs again."""
    with (
        lmcache_server() as server,
        engine("prefill", server, "unused", engine_kwargs={"tensor_parallel_size": 2}) as prefill,
    ):
        tokens = prompt(1, 1000)
        full = len(tokens) // CHUNK * CHUNK
        expected = prefill.tokens(tokens)
        prefill.forget_prefixes()
        prefill.prefill(tokens, "ranks-1")
        prefill.settle("ranks-1")
        rescued = prefill.end_of("ranks-1")
        assert (rescued["kind"], rescued["bytes"]) == ("rescued", full * TOKEN_BYTES)
        assert server.stored_bytes() == full * TOKEN_BYTES
        assert prefill.frees_all()
        prefill.forget_prefixes()
        assert prefill.tokens(tokens) == expected
        assert prefill.event(kind="loaded")["chunks"] == rescued["chunks"]
