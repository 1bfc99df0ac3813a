# SPDX-License-Identifier: Apache-2.0
"""A pair of real vLLM engines over NIXL: each way in which a hold ends is told, once, and frees the KV."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import httpx
import pytest

from pools.engine.base import HANDOFF_HEADER
from tests.support.engines import transfer_engine
from tests.support.stack import side_by_side
from transport.config import NixlConfig
from transport.handoff_params import HANDOFF_ID, REMOTE_DECODE

LEASE_S = 6
MAX_NUM_SEQS = 4
TOKENS = 300


class Pair:
    """Two engines, and how far their events have been read."""

    def __init__(self, prefill: str, decode: str, client: httpx.AsyncClient) -> None:
        self.prefill, self.decode, self._client = prefill, decode, client
        self._after = {prefill: 0, decode: 0}
        self._prompts = 0

    async def leg(self, handoff_id: str | None = None) -> tuple[list[int], dict[str, Any]]:
        """A prefill leg of a new prompt: its tokens, and the parameters for the decode leg."""
        salt = uuid.uuid4().int
        ids = [20 + (salt // (i + 1) + i * 7) % 1400 for i in range(TOKENS)]
        ours = {} if handoff_id is None else {HANDOFF_ID: handoff_id}
        asked = {**REMOTE_DECODE, **ours}
        body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "kv_transfer_params": asked}
        answer = await self._client.post(f"{self.prefill}/v1/completions", json=body)
        return ids, answer.json()["kv_transfer_params"] | ours

    async def answer(self, ids: list[int], params: dict[str, Any] | None, **more: Any) -> httpx.Response:
        """A decode leg, with the header that names its hand-off."""
        body = {"model": "tiny", "prompt": ids, "max_tokens": 4, "kv_transfer_params": params, **more}
        named = str((params or {}).get(HANDOFF_ID, ""))
        headers = {HANDOFF_HEADER: named} if named else {}
        return await self._client.post(f"{self.decode}/v1/completions", json=body, headers=headers)

    async def settle(self, *handoff_ids: str) -> None:
        answer = await self._client.post(f"{self.prefill}/disagg/v1/settle", json={"handoff_ids": handoff_ids})
        assert answer.json() == {"settled": len(handoff_ids)}

    async def events(self, url: str, count: int, within_s: float = 8) -> list[dict[str, Any]]:
        """The next `count` events of one engine. Raises TimeoutError when there are fewer."""
        found: list[dict[str, Any]] = []
        async with asyncio.timeout(within_s):
            while len(found) < count:
                query = {"after": self._after[url], "wait_s": within_s}
                batch = (await self._client.get(f"{url}/disagg/v1/events", params=query)).json()
                assert batch["lost"] == 0
                self._after[url] = batch["next"]
                found += batch["events"]
        return found

    async def stats(self, url: str) -> dict[str, Any]:
        return dict((await self._client.get(f"{url}/disagg/v1/stats")).json())


def _engine(role: Literal["prefill", "decode"], **engine_kwargs: Any) -> AbstractContextManager[str]:
    # In bfloat16, as engines on GPUs have it: its KV moves, too.
    kwargs = {"max_num_seqs": MAX_NUM_SEQS, "dtype": "bfloat16", **engine_kwargs}
    return transfer_engine(role, NixlConfig(kv_lease_duration_s=LEASE_S), name="handoffs", engine_kwargs=kwargs)


@pytest.fixture(scope="module", params=[True, False], ids=["async_scheduling", "sync_scheduling"])
def urls(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Both engines schedule ahead of their steps, or neither does: events must flow either way."""
    with side_by_side(
        _engine("prefill", async_scheduling=request.param), _engine("decode", async_scheduling=request.param)
    ) as (prefill, decode):
        yield prefill, decode


def check(urls: tuple[str, str], test: Callable[[Pair], Awaitable[None]]) -> None:
    """Run `test`; afterwards nothing more has been told and no KV is held."""

    async def run() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            pair = Pair(*urls, client)
            for url in urls:
                query = {"after": 0, "wait_s": 0}
                pair._after[url] = (await client.get(f"{url}/disagg/v1/events", params=query)).json()["next"]
            await test(pair)
            for url in urls:
                with pytest.raises(TimeoutError):
                    print("unexpected", await pair.events(url, 1, within_s=0.3))
                assert (await pair.stats(url))["kv_cache_usage"] == 0

    asyncio.run(run())


def produced(event: dict[str, Any], handoff_id: str) -> None:
    assert {k: event[k] for k in ("kind", "id", "tokens")} == {"kind": "produced", "id": handoff_id, "tokens": TOKENS}
    assert event["bytes"] > 0
    assert abs(event["at"] - time.time()) < 60


def ended(event: dict[str, Any], handoff_id: str, outcome: str) -> None:
    told = {k: event[k] for k in ("kind", "id", "outcome", "adopted")}
    assert told == {"kind": "ended", "id": handoff_id, "outcome": outcome, "adopted": False}


def test_consumed(urls: tuple[str, str]) -> None:
    """A hand-off that a decode engine read: held, read with most of its lease left, and no prompt token computed."""

    async def test(pair: Pair) -> None:
        ids, params = await pair.leg("consumed-1")
        before = await pair.stats(pair.decode)
        (await pair.answer(ids, params)).raise_for_status()
        first, second = await pair.events(pair.prefill, 2)
        produced(first, "consumed-1")
        ended(second, "consumed-1", "consumed")
        assert 0 < second["lease_left_s"] < LEASE_S
        # What is settled after its end is nobody's business any more.
        await pair.settle("consumed-1")
        after = await pair.stats(pair.decode)
        assert after["prompt_tokens_p2p_total"] - before["prompt_tokens_p2p_total"] == TOKENS
        assert (await pair.stats(pair.prefill))["num_notifications_after_expiry_total"] == 0

    check(urls, test)


def test_settled(urls: tuple[str, str]) -> None:
    """Settling frees the KV of twenty hand-offs at once, an unknown id among them changes nothing, and later readers
    are not served what is not there."""

    async def test(pair: Pair) -> None:
        names = [f"settled-{i}-{uuid.uuid4().hex[:4]}" for i in range(20)]
        await asyncio.gather(*(pair.leg(name) for name in names))
        held = await pair.events(pair.prefill, 20)
        assert sorted(event["id"] for event in held) == sorted(names)
        assert (await pair.stats(pair.prefill))["kv_cache_usage"] > 0
        started = time.monotonic()
        await pair.settle(*names, "nobody-knows")
        over = await pair.events(pair.prefill, 20)
        assert time.monotonic() - started < 2
        for event in over:
            ended(event, event["id"], "released")
            assert 0 < event["lease_left_s"] <= LEASE_S
        assert sorted(event["id"] for event in over) == sorted(names)

    check(urls, test)


def test_settled_before_produced(urls: tuple[str, str]) -> None:
    """A hand-off given up while its prompt is still being computed is not held."""

    async def test(pair: Pair) -> None:
        await pair.settle("early-1")
        await pair.leg("early-1")
        first, second = await pair.events(pair.prefill, 2)
        produced(first, "early-1")
        ended(second, "early-1", "released")
        assert second["at"] - first["at"] < 1

    check(urls, test)


def test_abandoned(urls: tuple[str, str]) -> None:
    """A hand-off that nobody mentions again expires with its lease; without an id it goes by vLLM's own."""

    async def test(pair: Pair) -> None:
        before = await pair.stats(pair.prefill)
        _, params = await pair.leg()
        first, second = await pair.events(pair.prefill, 2, within_s=LEASE_S + 5)
        produced(first, params["remote_request_id"])
        ended(second, params["remote_request_id"], "expired")
        assert second["lease_left_s"] is None
        assert LEASE_S - 1 < second["at"] - first["at"] < LEASE_S + 4
        after = await pair.stats(pair.prefill)
        assert after["num_kv_expired_reqs_total"] - before["num_kv_expired_reqs_total"] == 1

    check(urls, test)


def test_unread(urls: tuple[str, str]) -> None:
    """A request aborted while it waits at a full decode engine is told as unread, and its producer is not notified."""

    async def test(pair: Pair) -> None:
        busy = [
            asyncio.create_task(pair.answer([30 + i] * 64, None, max_tokens=2000, ignore_eos=True))
            for i in range(MAX_NUM_SEQS)
        ]
        while (await pair.stats(pair.decode))["num_requests_running"] < MAX_NUM_SEQS:
            await asyncio.sleep(0.05)
        ids, params = await pair.leg("unread-1")
        waiting = asyncio.create_task(pair.answer(ids, params))
        while not (await pair.stats(pair.decode))["num_requests_waiting"]:
            await asyncio.sleep(0.02)
        waiting.cancel()
        (unread,) = await pair.events(pair.decode, 1)
        assert (unread["kind"], unread["id"]) == ("unread", "unread-1")
        for task in busy:
            task.cancel()
        (first,) = await pair.events(pair.prefill, 1)
        produced(first, "unread-1")
        await pair.settle("unread-1")
        (second,) = await pair.events(pair.prefill, 1)
        ended(second, "unread-1", "released")
        while (await pair.stats(pair.decode))["num_requests_running"]:
            await asyncio.sleep(0.05)

    check(urls, test)


def test_refused(urls: tuple[str, str]) -> None:
    """A request that vLLM's own server refuses is told as unread, once. Its producer hears nothing, and its parameters
    are used up here."""

    async def test(pair: Pair) -> None:
        ids, params = await pair.leg("refused-1")
        await pair.events(pair.prefill, 1)
        assert (await pair.answer(ids, params, max_tokens=100_000)).status_code == 400
        again = await pair.answer(ids, params)
        assert again.status_code == 400
        assert "single-use" in again.text
        (unread,) = await pair.events(pair.decode, 1)
        assert (unread["kind"], unread["id"]) == ("unread", "refused-1")
        with contextlib.suppress(TimeoutError):
            raise AssertionError(await pair.events(pair.prefill, 1, within_s=0.5))
        await pair.settle("refused-1")
        (second,) = await pair.events(pair.prefill, 1)
        ended(second, "refused-1", "released")

    check(urls, test)


def test_left_before_the_engine(urls: tuple[str, str]) -> None:
    """A caller that leaves while vLLM's server still works on its prompt: told as unread, once, like one that leaves
    later."""

    async def test(pair: Pair) -> None:
        ids, params = await pair.leg("left-1")
        await pair.events(pair.prefill, 1)
        before = await pair.stats(pair.decode)
        # Half a request: the server waits for the rest of the body.
        url = httpx.URL(pair.decode)
        body = json.dumps({"model": "tiny", "prompt": ids, "max_tokens": 4, "kv_transfer_params": params}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"{HANDOFF_HEADER}: left-1\r\ncontent-length: {len(body)}\r\n\r\n"
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(head.encode() + body[:-10])
        await writer.drain()
        while not (await pair.stats(pair.decode))["num_requests_in_flight"]:
            await asyncio.sleep(0.01)
        writer.close()
        (unread,) = await pair.events(pair.decode, 1)
        assert (unread["kind"], unread["id"]) == ("unread", "left-1")
        assert (await pair.stats(pair.decode))["num_handoffs_admitted_total"] == before["num_handoffs_admitted_total"]
        await pair.settle("left-1")
        (released,) = await pair.events(pair.prefill, 1)
        ended(released, "left-1", "released")

    check(urls, test)


def test_a_read_that_fails(urls: tuple[str, str]) -> None:
    """A decode engine that cannot reach the producer computes the prompt itself and says that nothing was read."""

    async def test(pair: Pair) -> None:
        ids, params = await pair.leg("failed-1")
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        gone = params | {"remote_engine_id": uuid.uuid4().hex, "remote_port": port}
        answering = asyncio.create_task(pair.answer(ids, gone))
        (unread,) = await pair.events(pair.decode, 1, within_s=20)
        assert (unread["kind"], unread["id"]) == ("unread", "failed-1")
        (await answering).raise_for_status()
        await pair.settle("failed-1")
        (first, second) = await pair.events(pair.prefill, 2)
        produced(first, "failed-1")
        assert second["outcome"] in ("released", "expired")

    check(urls, test)
