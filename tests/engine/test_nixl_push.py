# SPDX-License-Identifier: Apache-2.0
"""A pair of real vLLM engines over NIXL in push mode: every way of a hand-off, told once, and no KV stays held."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from pools.engine.base import HANDOFF_HEADER
from tests.support.engines import transfer_engine
from tests.support.stack import free_port, side_by_side
from transport.config import NixlConfig
from transport.facts import EngineFacts, Role
from transport.handoff_params import HANDOFF_ID, REMOTE_DECODE
from transport.transports import describe

LEASE_S = 10
TOKENS = 300
BLOCK = 128
PUSH = NixlConfig(mode="push", kv_lease_duration_s=LEASE_S)


def engine(role: Role, port: int, engine_id: str) -> AbstractContextManager[str]:
    return transfer_engine(role, PUSH, name="push", listener_port=port, engine_id=engine_id)


def source(port: int, engine_id: str) -> dict[str, Any]:
    """What a prefill replica publishes."""
    facts = EngineFacts(role="prefill", platform="cpu", host="127.0.0.1", listener_port=port, engine_id=engine_id)
    return describe(PUSH).source(facts)


class Urls:
    """The two engines, and what the prefill engine's replica publishes."""

    def __init__(self, prefill: str, decode: str, published: dict[str, Any]) -> None:
        self.prefill, self.decode, self.published = prefill, decode, published


@pytest.fixture(scope="module")
def urls() -> Iterator[Urls]:
    """One pair for all cases."""
    port = free_port()
    both = engine("prefill", port, "prefill-1"), engine("decode", free_port(), "decode-1")
    with side_by_side(*both) as (prefill, decode):
        yield Urls(prefill, decode, source(port, "prefill-1"))


class Handoff:
    """One prompt that nobody has computed before, and its two legs."""

    def __init__(self, pair: Pair, ids: list[int]) -> None:
        self.id = f"push-{uuid.uuid4().hex[:12]}"
        self.ids = ids
        self._pair = pair

    async def prefill(self, **more: Any) -> httpx.Response:
        params = {**REMOTE_DECODE, HANDOFF_ID: self.id}
        body = {"model": "tiny", "prompt": self.ids, "max_tokens": 1, "ignore_eos": True, "kv_transfer_params": params}
        return await self._pair.post(self._pair.urls.prefill, body | more, {"x-request-id": self.id})

    async def decode(self, **changes: Any) -> httpx.Response:
        params = describe(PUSH).decode_params(self.id, self._pair.urls.published) | changes
        body = {"model": "tiny", "prompt": self.ids, "max_tokens": 8, "temperature": 0, "kv_transfer_params": params}
        return await self._pair.post(self._pair.urls.decode, body, {HANDOFF_HEADER: self.id})

    async def alone(self) -> str:
        """What the decode engine answers by itself."""
        body = {"model": "tiny", "prompt": self.ids, "max_tokens": 8, "temperature": 0, "cache_salt": uuid.uuid4().hex}
        return text(await self._pair.post(self._pair.urls.decode, body, {}))


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


class Pair:
    """The engines as one case sees them, and how far their events have been read."""

    def __init__(self, urls: Urls, client: httpx.AsyncClient) -> None:
        self.urls, self.client = urls, client
        self.after: dict[str, int] = {}

    def handoff(self, num_tokens: int = TOKENS) -> Handoff:
        salt = uuid.uuid4().int
        return Handoff(self, [20 + (salt // (i % 90 + 1) + i * 7) % 1400 for i in range(num_tokens)])

    async def post(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        return await self.client.post(f"{url}/v1/completions", json=body, headers=headers)

    async def settle(self, *handoff_ids: str) -> None:
        await self.client.post(f"{self.urls.prefill}/disagg/v1/settle", json={"handoff_ids": handoff_ids})

    async def events(self, url: str, count: int, within_s: float = 8) -> list[tuple[Any, ...]]:
        """Kind, id and outcome of the next `count` events of one engine. Raises TimeoutError when there are fewer."""
        found: list[dict[str, Any]] = []
        async with asyncio.timeout(within_s):
            while len(found) < count:
                query = {"after": self.after[url], "wait_s": within_s}
                batch = (await self.client.get(f"{url}/disagg/v1/events", params=query)).json()
                self.after[url] = batch["next"]
                found += batch["events"]
        return [(event["kind"], event["id"], event.get("outcome")) for event in found]

    async def produced_and(self, handoff: Handoff, outcome: str, within_s: float = 5) -> None:
        """The prefill engine has told that it held the hand-off, and how that ended."""
        told = await self.events(self.urls.prefill, 2, within_s)
        assert told == [("produced", handoff.id, None), ("ended", handoff.id, outcome)]

    async def stats(self, url: str) -> dict[str, Any]:
        return dict((await self.client.get(f"{url}/disagg/v1/stats")).json())

    @contextlib.asynccontextmanager
    async def spared(self, num_tokens: int) -> AsyncIterator[None]:
        """The decode engine computes at most the last token of a prompt and what it has to beside `num_tokens`."""
        before = await self.stats(self.urls.decode)
        yield
        after = await self.stats(self.urls.decode)
        assert after["prompt_tokens_p2p_total"] - before["prompt_tokens_p2p_total"] >= num_tokens - 1
        assert after["nixl_num_failed_transfers_total"] == before["nixl_num_failed_transfers_total"]


def check(urls: Urls, test: Callable[[Pair], Awaitable[None]]) -> None:
    """Run `test`; afterwards nothing more has been told and no KV is held."""

    async def run() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            pair = Pair(urls, client)
            both = (urls.prefill, urls.decode)
            for url in both:
                query = {"after": 0, "wait_s": 0}
                pair.after[url] = (await client.get(f"{url}/disagg/v1/events", params=query)).json()["next"]
            await test(pair)
            for url in both:
                with pytest.raises(TimeoutError):
                    print("unexpected", await pair.events(url, 1, within_s=0.3))
                async with asyncio.timeout(5):
                    while (await pair.stats(url))["kv_cache_usage"]:
                        await asyncio.sleep(0.1)
                assert (await pair.stats(url))["num_notifications_after_expiry_total"] == 0

    asyncio.run(run())


async def waiting(pair: Pair) -> None:
    """Return when the decode engine waits for KV and has told the prefill engine where to write."""
    async with asyncio.timeout(5):
        while not (await pair.stats(pair.urls.decode))["num_requests_waiting"]:
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.3)


@pytest.mark.parametrize("num_tokens", [TOKENS, 2 * BLOCK, BLOCK + 1])
@pytest.mark.parametrize("first", ["prefill", "decode", "both"])
def test_same_tokens(urls: Urls, first: str, num_tokens: int) -> None:
    """Whichever leg comes first, the answer is the decode engine's own, its prompt came over, and it is told once."""

    async def test(pair: Pair) -> None:
        handoff = pair.handoff(num_tokens)
        async with pair.spared(num_tokens):
            if first == "prefill":
                offered = await handoff.prefill()
                answer = await handoff.decode()
            else:
                decoding = asyncio.create_task(handoff.decode())
                if first == "decode":
                    await waiting(pair)
                offered, answer = await handoff.prefill(), await decoding
        assert not offered.json().get("kv_transfer_params")
        await pair.produced_and(handoff, "consumed")
        assert text(answer) == await handoff.alone()

    check(urls, test)


def test_a_part_in_the_prefix_cache(urls: Urls) -> None:
    """Of a prompt whose first block the decode engine has, only the rest is written, and where it belongs."""

    async def test(pair: Pair) -> None:
        known = pair.handoff(BLOCK + 1)
        body = {"model": "tiny", "prompt": known.ids, "max_tokens": 1}
        await pair.post(pair.urls.decode, body, {})
        handoff = Handoff(pair, known.ids + pair.handoff(2 * BLOCK).ids)
        async with pair.spared(2 * BLOCK):
            answers = await asyncio.gather(handoff.prefill(), handoff.decode())
        await pair.produced_and(handoff, "consumed")
        assert text(answers[1]) == await handoff.alone()

    check(urls, test)


def test_many_at_once(urls: Urls) -> None:
    """Legs of many hand-offs that meet in any order: each answer is its own prompt's."""

    async def test(pair: Pair) -> None:
        handoffs = [pair.handoff(TOKENS + i) for i in range(8)]
        legs = [leg for handoff in handoffs for leg in (handoff.decode(), handoff.prefill())]
        answers = (await asyncio.gather(*legs))[::2]
        told = await pair.events(pair.urls.prefill, 16)
        assert sorted(told, key=str) == sorted(
            [event for h in handoffs for event in (("produced", h.id, None), ("ended", h.id, "consumed"))], key=str
        )
        for handoff, answer in zip(handoffs, answers, strict=True):
            assert text(answer) == await handoff.alone()

    check(urls, test)


def test_settled(urls: Urls) -> None:
    """What the gateway settles is released at once, and whoever asks for it later computes the prompt."""

    async def test(pair: Pair) -> None:
        handoff = pair.handoff()
        await handoff.prefill()
        await pair.settle(handoff.id)
        await pair.produced_and(handoff, "released")
        started = time.monotonic()
        assert text(await handoff.decode()) == await handoff.alone()
        assert time.monotonic() - started < LEASE_S
        assert await pair.events(pair.urls.decode, 1) == [("unread", handoff.id, None)]

    check(urls, test)


def test_settled_before_it_is_produced(urls: Urls) -> None:
    """A decode engine that waits is told that nothing will come; what is produced later is released, not written."""

    async def test(pair: Pair) -> None:
        handoff = pair.handoff()
        decoding = asyncio.create_task(handoff.decode())
        await waiting(pair)
        started = time.monotonic()
        await pair.settle(handoff.id)
        answer = await decoding
        assert time.monotonic() - started < LEASE_S - 1
        assert await pair.events(pair.urls.decode, 1) == [("unread", handoff.id, None)]
        await handoff.prefill()
        await pair.produced_and(handoff, "released")
        assert text(answer) == await handoff.alone()

    check(urls, test)


def test_the_prefill_leg_is_aborted(urls: Urls) -> None:
    """A decode engine that waits for an aborted prompt is told, and computes it."""

    async def test(pair: Pair) -> None:
        handoff = pair.handoff(1500)
        decoding = asyncio.create_task(handoff.decode())
        await waiting(pair)
        prefilling = asyncio.create_task(handoff.prefill(max_tokens=400))
        await asyncio.sleep(0.3)
        await pair.client.post(f"{pair.urls.prefill}/disagg/v1/abort", json={"request_id": handoff.id})
        await prefilling
        answer = await decoding
        assert await pair.events(pair.urls.decode, 1) == [("unread", handoff.id, None)]
        assert text(answer) == await handoff.alone()

    check(urls, test)


def test_the_lease_ends(urls: Urls) -> None:
    """KV that no decode engine asks for is held for a lease; one that asks later computes the prompt."""

    async def test(pair: Pair) -> None:
        handoff = pair.handoff()
        await handoff.prefill()
        assert await pair.events(pair.urls.prefill, 1) == [("produced", handoff.id, None)]
        assert await pair.events(pair.urls.prefill, 1, LEASE_S + 5) == [("ended", handoff.id, "expired")]
        assert text(await handoff.decode()) == await handoff.alone()
        assert await pair.events(pair.urls.decode, 1) == [("unread", handoff.id, None)]

    check(urls, test)


def test_the_prefill_leg_never_comes(urls: Urls) -> None:
    """A decode engine waits for a lease, then computes the prompt; a leg that comes then is not written."""

    async def test(pair: Pair) -> None:
        handoff = pair.handoff()
        started = time.monotonic()
        answer = await handoff.decode()
        assert LEASE_S <= time.monotonic() - started < LEASE_S + 8
        assert await pair.events(pair.urls.decode, 1) == [("unread", handoff.id, None)]
        await handoff.prefill()
        await pair.settle(handoff.id)
        await pair.produced_and(handoff, "released")
        assert text(answer) == await handoff.alone()

    check(urls, test)


def test_the_client_leaves(urls: Urls) -> None:
    """A decode engine whose client leaves while it waits says so, and gives its blocks away when nobody can write."""

    async def test(pair: Pair) -> None:
        handoff = pair.handoff()
        decoding = asyncio.create_task(handoff.decode())
        await waiting(pair)
        decoding.cancel()
        assert await pair.events(pair.urls.decode, 1) == [("unread", handoff.id, None)]
        await pair.settle(handoff.id)
        await handoff.prefill()
        await pair.produced_and(handoff, "released")

    check(urls, test)


def test_the_lease_is_renewed_while_decode_queues(urls: Urls) -> None:
    """A decode engine that has taken a request but has no room for it keeps its KV alive, by the hand-off's id."""

    async def test(pair: Pair) -> None:
        long = {"max_tokens": 1400, "ignore_eos": True, "temperature": 0}
        bodies = [{"model": "tiny", "prompt": pair.handoff().ids, **long} for _ in range(40)]
        full = [asyncio.create_task(pair.post(pair.urls.decode, body, {})) for body in bodies]
        async with asyncio.timeout(10):
            while not (await pair.stats(pair.urls.decode))["num_requests_waiting"]:
                await asyncio.sleep(0.05)
        handoff = pair.handoff()
        decoding = asyncio.create_task(handoff.decode())
        await asyncio.sleep(1)
        await handoff.prefill()
        assert await pair.events(pair.urls.prefill, 1) == [("produced", handoff.id, None)]
        with pytest.raises(TimeoutError):
            print("unexpected", await pair.events(pair.urls.prefill, 1, LEASE_S + 1))
        assert not decoding.done()
        for task in full:
            task.cancel()
        assert text(await decoding) == await handoff.alone()
        assert await pair.events(pair.urls.prefill, 1) == [("ended", handoff.id, "consumed")]

    check(urls, test)


@pytest.mark.parametrize(
    "changes",
    [{"tp_size": None}, {"remote_request_id": None}, {"remote_host": 5}, {HANDOFF_ID: None}, {"remote_engine_id": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_unusable_parameters(urls: Urls, changes: dict[str, Any]) -> None:
    """Parameters with which vLLM's EngineCore would end, or wait for ever, are ignored."""

    async def test(pair: Pair) -> None:
        handoff = pair.handoff()
        assert text(await handoff.decode(**changes)) == await handoff.alone()

    check(urls, test)


def test_another_prefill_engine_at_the_address(urls: Urls) -> None:
    """A decode engine that looks for an engine of before a restart computes the prompt at once."""

    async def test(pair: Pair) -> None:
        handoff = pair.handoff()
        assert text(await handoff.decode(remote_engine_id="prefill-0")) == await handoff.alone()
        assert await pair.events(pair.urls.decode, 1) == [("unread", handoff.id, None)]

    check(urls, test)


def test_the_prefill_engine_dies(urls: Urls) -> None:
    """Whoever waits for it computes the prompt within seconds, and takes KV of the next engine. The last case."""

    async def test(pair: Pair) -> None:
        port = free_port()
        with engine("prefill", port, "prefill-2") as second:
            other = Pair(Urls(second, urls.decode, source(port, "prefill-2")), pair.client)
            warm, lost = other.handoff(), other.handoff()
            answers = await asyncio.gather(warm.decode(), warm.prefill())
            assert text(answers[0]) == await warm.alone()
            decoding = asyncio.create_task(lost.decode())
            await waiting(other)
        started = time.monotonic()
        answer = await decoding
        assert time.monotonic() - started < LEASE_S
        assert await pair.events(pair.urls.decode, 1) == [("unread", lost.id, None)]
        assert text(answer) == await lost.alone()
        handoff = pair.handoff()
        async with pair.spared(TOKENS):
            answers = await asyncio.gather(handoff.decode(), handoff.prefill())
        await pair.produced_and(handoff, "consumed")
        assert text(answers[0]) == await handoff.alone()

    check(urls, test)
