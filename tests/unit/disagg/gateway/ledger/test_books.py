# SPDX-License-Identifier: Apache-2.0
"""A gateway's ledger against what its engines did: under load, with clients that leave and replicas that die."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from disagg.config import AdminConfig, GatewayConfig
from disagg.observability.outcomes import ENDS
from pools.engine.base import Receive, Scope, Send
from pools.engine.fake.tiers import FakeSharedCache
from tests.support.gateway_stack import Stack, running_stack, until

KEY = "secret-1"
HEADERS = [("authorization", f"Bearer {KEY}")]


@pytest.fixture
def config(tmp_path: Path) -> GatewayConfig:
    """With an admin key."""
    (tmp_path / "key").write_text(KEY)
    return GatewayConfig(admin=AdminConfig(key_file=str(tmp_path / "key")))


def prompt(number: int) -> str:
    """Forty words that no other number has as a prefix."""
    return f"number {number} " + f"word{number} " * 38


async def leave(stack: Stack, number: int, after_s: float) -> None:
    """A client that asks and goes."""
    async with stack.streaming(prompt=prompt(number)) as connection:
        await asyncio.sleep(after_s)
        connection.leave()


def counts(stack: Stack) -> dict[str, int]:
    return {word: total.count for word, total in stack.gateway.ledger.totals.items() if total.count}


async def closed(stack: Stack) -> None:
    """Wait until the ledger has read all that living engines produced, and no hand-off is open."""

    def is_closed() -> bool:
        produced = sum(len(replica.engine.happened("produced")) for replica in stack.prefill)
        return counts(stack).get("produced", 0) >= produced and not stack.gateway.ledger.num_open

    await until(is_closed)


async def handoffs(stack: Stack, query: str = "") -> Any:
    reply = await stack.call("GET", f"/admin/v1/handoffs{query}", None, HEADERS)
    assert reply.status == 200, reply.body
    return reply.json()


async def test_one_request(config: GatewayConfig) -> None:
    """A request's record names it, its pair, its size and its end; warm-ups are not in the books."""
    async with running_stack(num_prefill=2, num_decode=2, config=config) as stack:
        reply = await stack.call(
            "POST",
            "/v1/completions",
            {"model": "tiny", "prompt": prompt(1), "max_tokens": 2},
            [("content-type", "application/json"), ("x-request-id", "mine")],
        )
        await closed(stack)
        assert counts(stack) == {"produced": 1, "consumed": 1}
        found = await handoffs(stack, "?request_id=mine")
        (record,) = found["records"]
        assert record["prefill"]["replica_id"] == reply.headers["x-disagg-prefill"]
        assert record["decode"]["replica_id"] == reply.headers["x-disagg-decode"]
        assert (record["outcome"], record["reason"]) == ("consumed", None)
        assert record["tokens"] == reply.json()["usage"]["prompt_tokens"] and record["bytes"] > 0
        assert 0 < record["lease_left_s"] <= 30
        assert found["balanced"] and found["num_open"] == 0
        assert stack.metric("disagg_handoff_lease_left_seconds_count") == 1
        assert stack.metric("disagg_handoff_tokens_total", outcome="consumed") == record["tokens"]
        assert (await handoffs(stack, "?request_id=other"))["records"] == []
        one = await stack.call("GET", f"/admin/v1/handoffs/{record['handoff_id']}", None, HEADERS)
        assert one.json() == record
        assert (await stack.call("GET", "/admin/v1/handoffs/nothing", None, HEADERS)).status == 404


async def test_key_and_filters(config: GatewayConfig) -> None:
    """The ledger needs the admin key; a bad filter is a 400 in OpenAI's shape that names it."""
    async with running_stack(num_prefill=0, config=config) as stack:
        for path in ("/admin/v1/handoffs", "/admin/v1/handoffs/x"):
            assert (await stack.call("GET", path)).status == 401
        for query, param in (("outcome=eaten", "outcome"), ("limit=x", "limit"), ("page=2", "page")):
            reply = await stack.call("GET", f"/admin/v1/handoffs?{query}", None, HEADERS)
            assert (reply.status, reply.json()["error"]["param"]) == (400, param)
        document = (await stack.call("GET", "/openapi.json")).json()["paths"]["/admin/v1/handoffs"]["get"]
        assert [p["name"] for p in document["parameters"]] == [
            "outcome",
            "gateway",
            "replica",
            "request_id",
            "tenant",
            "since",
            "limit",
        ]


async def refuse(scope: Scope, receive: Receive, send: Send) -> bool:
    """A decode engine's server that takes no request."""
    await send({"type": "http.response.start", "status": 400, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})
    return True


async def test_rescued_and_reused(config: GatewayConfig) -> None:
    """KV that nobody reads is rescued, once each, and found again by new engines, once each."""
    async with running_stack(config=config, shared_cache=FakeSharedCache(16)) as stack:
        stack.decode[0].engine.hook = refuse
        for number in range(10):
            assert (await stack.complete(prompt(number))).status == 400
        await closed(stack)
        assert counts(stack) == {"produced": 10, "rescued": 10, "stored": 10}
        records = (await handoffs(stack, "?outcome=rescued"))["records"]
        # The decode engine says `unread` of them too, before or after.
        assert all("decode_rejected" in record["reason"] for record in records)
        await asyncio.gather(stack.prefill[0].restart(), stack.decode[0].restart())
        stack.announce()
        await stack.warmed()
        for number in (*range(10), *range(10)):
            assert (await stack.complete(prompt(number))).status == 200
        expected = {"produced": 30, "rescued": 10, "consumed": 20, "stored": 10, "reused": 10}
        await until(lambda: counts(stack) == expected)
        totals = stack.gateway.ledger.totals
        assert totals["reused"].tokens == totals["stored"].tokens > 0
        assert len((await handoffs(stack, "?outcome=reused"))["records"]) == 10


async def test_consumed_is_not_stored(config: GatewayConfig) -> None:
    """A hand-off that went well leaves nothing in the shared cache, unless its client asks for it."""
    async with running_stack(config=config, shared_cache=FakeSharedCache(16)) as stack:
        await asyncio.gather(*(stack.complete(prompt(number)) for number in range(20)))
        await closed(stack)
        assert counts(stack) == {"produced": 20, "consumed": 20}
        await stack.complete(prompt(20), disagg_store="always")
        await until(lambda: counts(stack) == {"produced": 21, "consumed": 21, "stored": 1})
        assert stack.metric("disagg_stores_total", store="always") == 1


async def test_books_balance_under_load(config: GatewayConfig) -> None:
    """Clients that stay and leave at random moments, replicas that die: nothing is unaccounted for."""
    rng = random.Random(1)
    cache = FakeSharedCache(16)
    async with running_stack(
        num_prefill=2,
        num_decode=2,
        config=config,
        shared_cache=cache,
        lease_s=1.0,
        transfer_ms_per_1k_tokens=200,
        prefill_ms_per_1k_tokens=15,
    ) as stack:
        ledger = stack.gateway.ledger

        async def client(number: int) -> None:
            await asyncio.sleep(rng.random() * 0.8)
            if rng.random() < 0.5:
                await leave(stack, number, rng.random() * 0.05)
            else:
                await stack.complete(prompt(number))

        async def deaths() -> None:
            await asyncio.sleep(0.3)
            stack.prefill[0].kill()
            dead = stack.prefill.pop(0)
            await asyncio.sleep(0.1)
            stack.announce()
            await asyncio.sleep(0.2)
            stack.decode[0].kill()
            also = stack.decode.pop(0)
            stack.announce()
            await asyncio.gather(dead.engine.shutdown(), also.engine.shutdown())

        async def auditor() -> None:
            while True:
                assert ledger.balanced
                await asyncio.sleep(0.001)

        audit = asyncio.create_task(auditor())
        await asyncio.gather(deaths(), *(client(number) for number in range(200)))
        await closed(stack)
        assert not audit.done()
        audit.cancel()
        said = await handoffs(stack, "?limit=1000")
        assert said["balanced"] and said["num_open"] == 0
        assert said["totals"]["produced"]["count"] == sum(said["totals"][word]["count"] for word in ENDS)
        # The replica that lived: the ledger holds exactly what it produced, each with the end that it told.
        (engine,) = (replica.engine for replica in stack.prefill)
        told = {event["id"]: event["outcome"] for event in engine.happened("ended") if not event["adopted"]}
        told |= {event["id"]: "rescued" for event in engine.happened("rescued")}
        of_it = {r["handoff_id"]: r["outcome"] for r in said["records"] if r["prefill"]["replica_id"] == "p1"}
        assert of_it == told and len(told) > 20
        assert said["totals"]["rescued"]["count"] > 0
