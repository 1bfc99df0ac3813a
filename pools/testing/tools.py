# SPDX-License-Identifier: Apache-2.0
"""What the checks of an engine are written with: requests, expectations, a hand-off's two legs. Not an interface."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pools.client import routes
from pools.testing.client import HttpReply, OpenReply, open_request, request
from transport.handoff_params import DO_REMOTE_PREFILL, HANDOFF_ID, offer_params

NUM_TOKENS = 8
SETTLE_S = 10.0
"""How long counters and gauges may lag behind answers."""
LONG = 1_000
"""Tokens of an answer that only an abort ends in time."""


@dataclass(frozen=True)
class Engines:
    """The pair under test.

    `prompts` are at least two different texts of 32 tokens or more that leave room for 1,000 more tokens.
    """

    prefill: str
    decode: str
    model: str
    prompts: Sequence[str]


Check = Callable[[Engines], Awaitable[None]]


STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def expect(claim: bool, message: str) -> None:
    if not claim:
        raise AssertionError(message)


def completion_body(engines: Engines, ids: Sequence[int]) -> dict[str, Any]:
    return {
        "model": engines.model,
        "prompt": list(ids),
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def chat_body(engines: Engines) -> dict[str, Any]:
    return {
        "model": engines.model,
        "messages": [{"role": "user", "content": engines.prompts[1]}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }


async def get_json(url: str, path: str) -> Any:
    reply = await request("GET", url + path)
    expect(reply.status == 200, f"GET {path}: {reply.status} {reply.body[:300]!r}")
    return reply.json()


async def post_json(url: str, path: str, body: Any) -> Any:
    reply = await request("POST", url + path, body)
    expect(reply.status == 200, f"POST {path}: {reply.status} {reply.body[:300]!r}")
    return reply.json()


async def stats_of(url: str) -> dict[str, Any]:
    stats: dict[str, Any] = await get_json(url, routes.STATS)
    return stats


async def tokens_of(engines: Engines, prompt: str) -> list[int]:
    ids: list[int] = (await post_json(engines.decode, "/tokenize", {"model": engines.model, "prompt": prompt}))[
        "tokens"
    ]
    return ids


async def fresh_prompt(engines: Engines) -> list[int]:
    """A prompt that no engine has seen: the first one's tokens, shuffled."""
    ids = await tokens_of(engines, engines.prompts[0])
    random.SystemRandom().shuffle(ids)
    return ids


async def answer_of(engines: Engines, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    return await post_json(engines.decode, path, body)


def new_id() -> str:
    return f"check-{uuid.uuid4().hex}"


async def prefill_leg(
    engines: Engines, ids: Sequence[int], salt: str | None = None, *, handoff_id: str | None = None
) -> dict[str, Any]:
    """Parameters for the decode leg, with the id under which the prefill engine's events speak of them."""
    offer = offer_params(handoff_id or new_id())
    body = completion_body(engines, ids) | {"max_tokens": 1, "stream": False}
    body["kv_transfer_params"] = offer
    if salt:
        body["cache_salt"] = salt
    answer = await post_json(engines.prefill, "/v1/completions", body)
    expect(answer["usage"]["completion_tokens"] == 1, "a prefill leg is one token")
    params = answer["kv_transfer_params"]
    expect(isinstance(params, dict) and params[DO_REMOTE_PREFILL] is True, f"no hand-off: {params}")
    return {**params, HANDOFF_ID: offer[HANDOFF_ID]}


async def newest_event(url: str) -> int:
    """Number of the last event so far."""
    batch = await get_json(url, f"{routes.EVENTS}?after=0")
    return int(batch["next"])


async def events_of(url: str, after: int) -> list[dict[str, Any]]:
    batch = await get_json(url, f"{routes.EVENTS}?after={after}")
    expect(batch["lost"] == 0, f"{batch['lost']} events lost")
    events: list[dict[str, Any]] = batch["events"]
    return events


def is_event(event: dict[str, Any], kind: str, handoff_id: str) -> bool:
    return event["kind"] == kind and event.get("id") == handoff_id


async def fate_of(engines: Engines, handoff_id: str, after: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the prefill engine says of a hand-off: that it is held and, in time, that it no longer is."""
    told: list[dict[str, Any]] = []

    async def ended() -> bool:
        events = await events_of(engines.prefill, after)
        told[:] = [event for event in events if event.get("id") == handoff_id]
        return any(event["kind"] == "ended" for event in told)

    await eventually(ended, f"{handoff_id} has not ended: {told}")
    expect([event["kind"] for event in told[:2]] == ["produced", "ended"], f"events {told}")
    return told[0], told[1]


async def decode_leg(engines: Engines, ids: Sequence[int], salt: str | None = None) -> dict[str, Any]:
    return {"kv_transfer_params": await prefill_leg(engines, ids, salt)}


@contextlib.asynccontextmanager
async def held_handoff(engines: Engines, ids: Sequence[int]) -> AsyncIterator[dict[str, Any]]:
    """A hand-off that is given back at the end."""
    params = await prefill_leg(engines, ids)
    try:
        yield params
    finally:
        await post_json(engines.prefill, routes.SETTLE, {"handoff_ids": [params[HANDOFF_ID]]})


async def streamed_events(engines: Engines, path: str, body: dict[str, Any]) -> list[Any]:
    """The JSON of every event before `[DONE]`, each seen to be one write."""
    async with asyncio.timeout(60), open_request("POST", engines.decode + path, body) as reply:
        expect(reply.status == 200, f"{path} answered {reply.status}")
        kind = reply.headers.get("content-type", "")
        expect(kind.startswith("text/event-stream"), f"content-type {kind!r}")
        frames = [frame async for frame in reply.frames()]
    for frame in frames:
        one_event = frame.startswith(b"data: ") and frame.endswith(b"\n\n") and frame.count(b"\n\n") == 1
        expect(one_event, f"not one event a write: {frame!r}")
    expect(frames[-1] == b"data: [DONE]\n\n", f"ends with {frames[-1]!r}")
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames[:-1]]


def streamed_ids(events: Sequence[Any]) -> list[int]:
    return [token for event in events for token in event["choices"][0]["token_ids"]]


def counts_of(usage: dict[str, Any]) -> dict[str, Any]:
    return {key: usage[key] for key in ("prompt_tokens", "total_tokens", "completion_tokens")}


async def first_event(reply: OpenReply) -> None:
    expect(reply.status == 200, f"status {reply.status}")
    frames = reply.frames()
    await anext(frames)


def expect_error(reply: HttpReply, status: int | None) -> None:
    """An error in the OpenAI shape; any 4xx or 5xx when `status` is None."""
    right = reply.status == status if status else reply.status >= 400
    expect(right, f"status {reply.status}, expected {status or 'an error'}: {reply.body[:300]!r}")
    error = reply.json()["error"]
    expect(bool(error["message"]) and bool(error["type"]) and "param" in error, f"error shape {error}")
    expect(error["code"] == reply.status, f"code {error['code']} in a {reply.status}")


def growth_of(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    return {key: after[key] - before[key] for key in before if key.endswith("_total")}


def idle_claim(url: str) -> Callable[[], Awaitable[bool]]:
    async def idle() -> bool:
        stats = await stats_of(url)
        return bool(stats["num_requests_running"] == 0 == stats["num_requests_waiting"])

    return idle


async def eventually(claim: Callable[[], Awaitable[bool]], message: str) -> None:
    deadline = time.monotonic() + SETTLE_S
    while not await claim():
        expect(time.monotonic() < deadline, message)
        await asyncio.sleep(0.05)
