# SPDX-License-Identifier: Apache-2.0
"""A pair of real vLLM engines over Mooncake and TCP: legs in any order, and every way in which a hand-off ends."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import pytest

from tests.support.engines import transfer_engine
from tests.support.stack import free_port, kill_family, side_by_side
from transport.config import MooncakeConfig
from transport.handoff_params import HANDOFF_ID, REMOTE_DECODE, REMOTE_PREFILL

LEASE_S = 16
SOON_S = 12.0
"""Well below the lease: whoever answers within it was told, and did not wait the lease out. It takes a second or two,
five when another pair of engines starts beside these."""
NUM_TOKENS = 700
BYTES_A_TOKEN = 4096
"""KV of the tiny model in float32."""


@dataclass(frozen=True)
class Pair:
    """One prefill and one decode engine, and how the decode engine finds the other one."""

    prefill: str
    decode: str
    bootstrap: str
    engine_id: str


def _engine(role: Literal["prefill", "decode"], port: int | None = None) -> AbstractContextManager[str]:
    transport = MooncakeConfig(type="mooncake", kv_lease_duration_s=LEASE_S, connector_timeout_s=3)
    return transfer_engine(role, transport, name="mooncake", listener_port=port)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Both engines, with a lease of a few seconds."""
    port = free_port()
    with side_by_side(_engine("prefill", port), _engine("decode")) as (prefill, decode):
        bootstrap = f"http://127.0.0.1:{port}"
        (entry,) = httpx.get(f"{bootstrap}/query", timeout=5).json().values()
        yield Pair(prefill, decode, bootstrap, entry["engine_id"])


class Handoff:
    """One prompt that nobody has computed before, and its two legs."""

    def __init__(self, pair: Pair, client: httpx.AsyncClient, num_tokens: int = NUM_TOKENS) -> None:
        self.id = f"h-{uuid.uuid4().hex}"
        self.pair = pair
        self.client = client
        first = uuid.uuid4().int
        self.prompt = [20 + (first >> (i % 90) ^ i * 7) % 1400 for i in range(num_tokens)]

    async def prefill(self, **changes: Any) -> httpx.Response:
        params = {**REMOTE_DECODE, **self._ids()}
        body = {"model": "tiny", "prompt": self.prompt, "max_tokens": 1, "ignore_eos": True, **changes}
        headers = {"x-request-id": self.id}
        return await self._post(self.pair.prefill, {**body, "kv_transfer_params": params}, headers)

    async def decode(self, *, name: str = "", max_tokens: int = 24, **params: Any) -> httpx.Response:
        asked = {
            **REMOTE_PREFILL,
            "remote_engine_id": self.pair.engine_id,
            "remote_bootstrap_addr": self.pair.bootstrap,
            **self._ids(),
            **params,
        }
        headers = {"x-request-id": name or f"d-{self.id}"}
        return await self._post(self.pair.decode, {**self._answer(max_tokens), "kv_transfer_params": asked}, headers)

    async def local(self) -> list[int]:
        """The answer of the decode engine alone, its prefix cache unused."""
        answer = await self._post(self.pair.decode, {**self._answer(24), "cache_salt": uuid.uuid4().hex}, {})
        return tokens(answer)

    async def settle(self) -> None:
        (
            await self.client.post(f"{self.pair.prefill}/disagg/v1/settle", json={"handoff_ids": [self.id]})
        ).raise_for_status()

    async def ended(self, within_s: float) -> dict[str, Any]:
        """The event that says how the hold on the prefill engine ended."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            for event in await events(self.client, self.pair.prefill):
                if event.get("id") == self.id and event["kind"] == "ended":
                    return event
            await asyncio.sleep(0.05)
        raise AssertionError(f"after {within_s} s the hold of {self.id} has not ended")

    def _ids(self) -> dict[str, Any]:
        return {"transfer_id": self.id, HANDOFF_ID: self.id}

    def _answer(self, max_tokens: int) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": self.prompt, "max_tokens": max_tokens, "temperature": 0.0}
        return {**body, "ignore_eos": True, "return_token_ids": True}

    async def _post(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        return await self.client.post(f"{url}/v1/completions", json=body, headers=headers)


def tokens(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


async def stats(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.get(f"{url}/disagg/v1/stats")).json()
    return answer


async def events(client: httpx.AsyncClient, url: str) -> list[dict[str, Any]]:
    batch = (await client.get(f"{url}/disagg/v1/events", params={"after": 0, "wait_s": 0})).json()
    found: list[dict[str, Any]] = batch["events"]
    return found


async def bytes_sent(client: httpx.AsyncClient, pair: Pair) -> float:
    text = (await client.get(f"{pair.prefill}/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:mooncake_bytes_transferred_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def timed(answer: Awaitable[httpx.Response]) -> tuple[httpx.Response, float]:
    started = time.monotonic()
    response = await answer
    return response, time.monotonic() - started


async def assert_no_kv(client: httpx.AsyncClient, *urls: str, within_s: float = SOON_S) -> None:
    """No block is held for anybody any more, on any of these engines."""
    deadline = time.monotonic() + within_s
    usage = dict.fromkeys(urls, 1.0)
    while any(usage.values()) and time.monotonic() < deadline:
        # An idle engine reports nothing, so give it one token to compute.
        for url in urls:
            await client.post(f"{url}/disagg/v1/probe", json={"prompt_token_ids": [30, 31, 32]})
            usage[url] = (await stats(client, url))["kv_cache_usage"]
        await asyncio.sleep(0.05)
    assert not any(usage.values()), usage


@asynccontextmanager
async def connected() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60) as client:
        yield client


def check(test: Callable[[Pair, httpx.AsyncClient], Awaitable[None]], pair: Pair) -> None:
    async def run() -> None:
        async with connected() as client:
            await test(pair, client)

    asyncio.run(run())


def test_bootstrap_names_the_engine(pair: Pair) -> None:
    """`GET {bootstrap}/query` says which engine listens there, and where each of its ranks does."""
    (dp_rank, entry), *rest = httpx.get(f"{pair.bootstrap}/query", timeout=5).json().items()
    assert (dp_rank, rest) == ("0", [])
    assert entry["engine_id"].startswith("prefill-")
    assert list(entry["worker_addr"]) == ["0"] and list(entry["worker_addr"]["0"]) == ["0"]
    assert entry["worker_addr"]["0"]["0"].startswith("tcp://127.0.0.1:")


@pytest.mark.parametrize("order", ["prefill first", "decode first", "together"])
def test_either_leg_may_come_first(pair: Pair, order: str) -> None:
    """Greedy tokens are those of one engine alone, the KV is moved, and decode computes one token of the prompt."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        handoff = Handoff(pair, client)
        sent = await bytes_sent(client, pair)
        before = await stats(client, pair.decode)
        if order == "prefill first":
            (await handoff.prefill()).raise_for_status()
            answer, took = await timed(handoff.decode())
        else:
            waiting = asyncio.create_task(timed(handoff.decode()))
            await asyncio.sleep(0.5 if order == "decode first" else 0)
            (await handoff.prefill()).raise_for_status()
            answer, took = await waiting
        print(f"{order}: {took:.2f} s")
        ended = await handoff.ended(SOON_S)
        assert ended["outcome"] == "consumed" and 0 < ended["lease_left_s"] <= LEASE_S
        after = await stats(client, pair.decode)
        computed = after["prompt_tokens_computed_total"] - before["prompt_tokens_computed_total"]
        assert computed <= 1, "the prompt was computed on decode"
        assert await bytes_sent(client, pair) > sent
        assert tokens(answer) == await handoff.local()
        await assert_no_kv(client, pair.prefill, pair.decode)

    check(test, pair)


def test_many_at_once(pair: Pair) -> None:
    """More hand-offs than sender threads, their decode legs first: all are read, none waits for a lease to end."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        handoffs = [Handoff(pair, client, 200 + 10 * i) for i in range(24)]
        started = time.monotonic()
        waiting = [asyncio.create_task(handoff.decode(max_tokens=4)) for handoff in handoffs]
        await asyncio.sleep(0.5)
        for handoff in reversed(handoffs):
            (await handoff.prefill()).raise_for_status()
        answers = await asyncio.gather(*waiting)
        print(f"24 hand-offs: {time.monotonic() - started:.2f} s")
        assert all(answer.status_code == 200 for answer in answers)
        for handoff in handoffs:
            assert (await handoff.ended(SOON_S))["outcome"] == "consumed"
        for handoff, answer in zip(handoffs[::8], answers[::8], strict=True):
            assert tokens(answer) == (await handoff.local())[:4]

    check(test, pair)


def test_aborted_prefill_makes_the_decode_engine_compute(pair: Pair) -> None:
    """A prefill leg aborted while a decode leg waits for it: the decode engine hears of it and answers itself."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        # Enough others that this one is queued behind them.
        crowd = [Handoff(pair, client, 3500) for _ in range(2)]
        others = [asyncio.create_task(other.prefill()) for other in crowd]
        handoff = Handoff(pair, client)
        waiting = asyncio.create_task(timed(handoff.decode()))
        leg = asyncio.create_task(handoff.prefill())
        await asyncio.sleep(0.3)
        aborted = (await client.post(f"{pair.prefill}/disagg/v1/abort", json={"request_id": handoff.id})).json()
        assert aborted["aborted"]
        asked = time.monotonic()
        answer, _ = await waiting
        print(f"told after {time.monotonic() - asked:.2f} s")
        assert time.monotonic() - asked < SOON_S
        assert tokens(answer) == await handoff.local()
        await asyncio.gather(leg, *others, return_exceptions=True)
        for other in crowd:
            await other.settle()
            await other.ended(SOON_S)
        await assert_no_kv(client, pair.prefill, pair.decode)

    check(test, pair)


def test_unclaimed_kv_expires(pair: Pair) -> None:
    """When no decode leg comes the prefill engine frees the blocks after the lease, and a late one is told at once."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        handoff = Handoff(pair, client)
        (await handoff.prefill()).raise_for_status()
        started = time.monotonic()
        ended = await handoff.ended(LEASE_S + SOON_S)
        assert ended["outcome"] == "expired" and ended["lease_left_s"] is None
        assert time.monotonic() - started > LEASE_S - 1
        await assert_no_kv(client, pair.prefill)
        answer, took = await timed(handoff.decode())
        print(f"late by a lease: {took:.2f} s")
        assert took < SOON_S
        assert tokens(answer) == await handoff.local()

    check(test, pair)


def test_settled_kv_is_released_at_once(pair: Pair) -> None:
    """`settle` ends the hold well before its lease; a decode leg that comes after all computes for itself."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        handoff = Handoff(pair, client)
        (await handoff.prefill()).raise_for_status()
        await handoff.settle()
        ended = await handoff.ended(SOON_S)
        assert ended["outcome"] == "released" and ended["lease_left_s"] > 0
        await assert_no_kv(client, pair.prefill)
        answer, took = await timed(handoff.decode())
        assert took < SOON_S
        assert tokens(answer) == await handoff.local()

    check(test, pair)


def test_settling_what_was_never_produced_frees_the_decode_engine(pair: Pair) -> None:
    """A decode leg whose prefill leg never reached its engine is told when the gateway settles, not after the lease."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        handoff = Handoff(pair, client)
        waiting = asyncio.create_task(timed(handoff.decode()))
        await asyncio.sleep(0.5)
        await handoff.settle()
        answer, took = await waiting
        print(f"settled, never produced: {took:.2f} s")
        assert took < SOON_S
        assert tokens(answer) == await handoff.local()
        (await handoff.prefill()).raise_for_status()
        assert (await handoff.ended(SOON_S))["outcome"] == "released"
        await assert_no_kv(client, pair.prefill, pair.decode)

    check(test, pair)


def test_the_same_hand_off_twice_is_refused(pair: Pair) -> None:
    """Parameters are used once: a second request with them is answered 400, another transfer is not."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        handoff, other = Handoff(pair, client), Handoff(pair, client)
        for one in (handoff, other):
            (await one.prefill()).raise_for_status()
        assert tokens(await handoff.decode())
        again = await handoff.decode(name=f"again-{handoff.id}")
        assert again.status_code == 400 and "single-use" in again.text
        assert tokens(await other.decode())
        assert (await other.ended(SOON_S))["outcome"] == "consumed"

    check(test, pair)


def test_aborted_decode_frees_its_blocks(pair: Pair) -> None:
    """A decode leg aborted while it waits keeps no block once its hand-off is settled, and neither engine stumbles."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        handoff = Handoff(pair, client)
        leg = asyncio.create_task(handoff.decode())
        await asyncio.sleep(0.5)
        aborted = (await client.post(f"{pair.decode}/disagg/v1/abort", json={"request_id": f"d-{handoff.id}"})).json()
        assert aborted["aborted"]
        await asyncio.gather(leg, return_exceptions=True)
        await handoff.settle()
        await assert_no_kv(client, pair.decode)
        fine = Handoff(pair, client)
        (await fine.prefill()).raise_for_status()
        assert tokens(await fine.decode()) == await fine.local()

    check(test, pair)


def test_a_first_token_that_ends_the_answer_is_handed_over(pair: Pair) -> None:
    """A prefill leg that stops by itself offers its KV like one that reaches its limit; vLLM drops it."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        handoff = Handoff(pair, client, 256)
        first = (await handoff.local())[0]
        answer = await handoff.prefill(stop_token_ids=[first], temperature=0.0)
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        assert tokens(await handoff.decode()) == await handoff.local()
        assert (await handoff.ended(SOON_S))["outcome"] == "consumed"

    check(test, pair)


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_prompt_that_decode_knows_in_part(pair: Pair, max_tokens: int) -> None:
    """Only the missing block moves, and it is the prompt's, also when prefill holds a block of output after it."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        # Whole blocks, so that a further token on prefill takes a further block.
        first = Handoff(pair, client, 3 * 128)
        (await first.prefill()).raise_for_status()
        answer = tokens(await first.decode())
        whole = await bytes_sent(client, pair)
        again = Handoff(pair, client)
        again.prompt = first.prompt
        (await again.prefill(max_tokens=max_tokens, cache_salt=again.id)).raise_for_status()
        assert tokens(await again.decode()) == answer
        assert (await again.ended(SOON_S))["outcome"] == "consumed"
        moved = await bytes_sent(client, pair) - whole
        assert moved == 128 * BYTES_A_TOKEN
        assert answer == await first.local()

    check(test, pair)


@pytest.mark.parametrize(
    "params",
    [
        {"remote_engine_id": "prefill-of-yesterday"},
        {"remote_engine_id": "prefill-unknown", "remote_bootstrap_addr": "http://127.0.0.1:9"},
        {"remote_bootstrap_addr": "nonsense"},
        {"remote_engine_id": None},
    ],
    ids=["old engine id", "nobody there", "no address", "no engine id"],
)
def test_a_producer_that_cannot_be_found_costs_a_recompute(pair: Pair, params: dict[str, Any]) -> None:
    """Wrong or incomplete parameters make the decode engine compute the prompt, soon."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        handoff = Handoff(pair, client)
        answer, took = await timed(handoff.decode(**params))
        print(f"{params}: {took:.2f} s")
        assert took < SOON_S
        assert tokens(answer) == await handoff.local()

    check(test, pair)


def test_parameters_of_the_other_role_are_ignored(pair: Pair) -> None:
    """Decode parameters on a prefill engine do not take it down."""

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        handoff = Handoff(pair, client)
        swapped = Handoff(Pair(pair.prefill, pair.prefill, pair.bootstrap, pair.engine_id), client)
        assert tokens(await swapped.decode())
        (await handoff.prefill()).raise_for_status()
        assert tokens(await handoff.decode())

    check(test, pair)


def test_a_killed_prefill_engine_costs_a_recompute(pair: Pair) -> None:
    """A decode leg that waits for an engine that is killed answers within seconds, and so does one that comes later.

    A successor on the same port is found under its own id. Last, because it takes the prefill engine away.
    """

    async def test(pair: Pair, client: httpx.AsyncClient) -> None:
        known, handoff, late = (Handoff(pair, client) for _ in range(3))
        (await known.prefill()).raise_for_status()
        assert tokens(await known.decode())
        waiting = asyncio.create_task(handoff.decode())
        await asyncio.sleep(0.5)
        kill_family((await stats(client, pair.prefill))["pid"])
        killed = time.monotonic()
        answer = await waiting
        print(f"answered {time.monotonic() - killed:.2f} s after the kill")
        assert time.monotonic() - killed < SOON_S
        assert tokens(answer) == await handoff.local()
        answer, took = await timed(late.decode())
        print(f"asked after the kill: {took:.2f} s")
        assert took < SOON_S
        assert tokens(answer) == await late.local()
        await assert_no_kv(client, pair.decode)

    check(test, pair)
    with _engine("prefill", int(pair.bootstrap.rsplit(":", 1)[1])) as prefill:
        query = httpx.get(f"{pair.bootstrap}/query", timeout=5).json()
        print(query)
        (entry,) = query.values()
        assert entry["engine_id"] != pair.engine_id
        successor = Pair(prefill, pair.decode, pair.bootstrap, entry["engine_id"])

        async def found(pair: Pair, client: httpx.AsyncClient) -> None:
            handoff, stale = Handoff(successor, client), Handoff(pair, client)
            waiting = asyncio.create_task(handoff.decode())
            (await handoff.prefill()).raise_for_status()
            assert tokens(await waiting) == await handoff.local()
            assert (await handoff.ended(SOON_S))["outcome"] == "consumed"
            answer, took = await timed(stale.decode())
            print(f"asked under the old id: {took:.2f} s")
            assert took < SOON_S
            assert tokens(answer) == await stale.local()

        check(found, pair)
