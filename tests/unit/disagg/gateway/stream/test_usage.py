# SPDX-License-Identifier: Apache-2.0
"""`cached_tokens` of an answer: what some engine had before, whichever way the answer came about."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from disagg.gateway.handoff import transfer
from disagg.gateway.handoff.cached import Cached
from disagg.gateway.stream.usage import CorrectedStream, corrected
from pools.client.messages import PrefillReply
from pools.engine.base import Message, Receive, Scope, Send
from pools.engine.fake.text import encode
from tests.support.gateway_stack import TRANSPORTS, Reply, Stack, running_stack

PROMPT = "a prompt longer than one block of KV"
OTHER = "another prompt that is longer than one block"
WHOLE_BLOCKS = len(encode(PROMPT)) // 16 * 16
TRANSPORT = pytest.mark.parametrize("transport", list(TRANSPORTS))
SPLICED = pytest.mark.parametrize("spliced", [True, False], ids=["spliced", "asgi"])
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
SEVERAL: dict[str, Any] = {"n": 2, "temperature": 1.0}


def usage(details: str) -> bytes:
    return b'data: {"choices":[],"usage":{"prompt_tokens":9,"prompt_tokens_details":%b}}\n\n' % details.encode()


def cached(reply: Reply) -> int:
    """The figure that a client reads, whole or streamed."""
    streamed = reply.headers["content-type"].startswith("text/event-stream")
    answer = json.loads(reply.events[-2]) if streamed else reply.json()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (usage('{"cached_tokens":7}'), usage('{"cached_tokens":3}')),
        (
            usage('{"multimodal_tokens":null,"created_cache_tokens":4,"cached_tokens":12}'),
            usage('{"multimodal_tokens":null,"created_cache_tokens":4,"cached_tokens":3}'),
        ),
        (usage("null"), usage("null")),
        (usage('{"cached_tokens":null}'), usage('{"cached_tokens":null}')),
    ],
)
def test_only_the_figure_changes(before: bytes, after: bytes) -> None:
    """Byte for byte, and text that looks like it is left alone."""
    text = json.dumps({"text": usage('{"cached_tokens":7}').decode()}).encode()
    assert corrected(before, Cached(3)) == after
    assert corrected(text + before, Cached(3)) == text + after


def test_pieces_of_a_stream() -> None:
    """The figure is found however the stream is cut, and nothing is lost, also of a stream that breaks off."""
    whole = b'data: {"choices":[1]}\n\n' + usage('{"cached_tokens":71}') + b"data: [DONE]\n\n"
    wanted = whole.replace(b"71", b"3")
    for cut in range(len(whole)):
        stream = CorrectedStream(Cached(3))
        assert stream.feed(whole[:cut]) + stream.feed(whole[cut:]) == wanted
        assert stream.unfinished() == b""
        assert stream.feed(whole[:cut]) + stream.unfinished() in (whole[:cut], whole[:cut].replace(b"71", b"3"))


async def test_what_a_prefill_leg_says() -> None:
    """The larger of the two engines' figures, once the leg has ended well."""

    async def leg(reply: PrefillReply | Exception) -> PrefillReply:
        if isinstance(reply, Exception):
            raise reply
        return reply

    ended = asyncio.ensure_future(leg(PrefillReply(200, None, True, 48)))
    failed = asyncio.ensure_future(leg(ValueError("lost")))
    runs: asyncio.Task[PrefillReply] = asyncio.ensure_future(asyncio.sleep(60, PrefillReply(200)))
    await Cached(leg=ended).known()
    await Cached(leg=failed).known()
    assert (Cached(leg=ended).corrected(16), Cached(leg=ended).corrected(64)) == (48, 64)
    assert Cached(leg=failed).corrected(16) == Cached(leg=runs).corrected(16) == 16
    runs.cancel()


@SPLICED
@TRANSPORT
async def test_a_hand_off_brings_nothing_cached(transport: str, spliced: bool) -> None:
    """A new prompt counts as not cached in every mode, and one that prefill or decode had as cached."""
    async with running_stack(transport=transport, spliced=spliced) as stack:
        for fields in ({}, STREAM, SEVERAL, SEVERAL | STREAM):
            await forget(stack)
            assert cached(await stack.complete(PROMPT, **fields)) == 0
            assert cached(await stack.complete(PROMPT, **fields)) == WHOLE_BLOCKS
            await forget(stack, "decode")
            assert cached(await stack.complete(PROMPT, **fields)) == WHOLE_BLOCKS
            await forget(stack, "prefill")
            assert cached(await stack.complete(PROMPT, **fields)) == WHOLE_BLOCKS


@TRANSPORT
async def test_a_list_of_prompts_counts_each(transport: str) -> None:
    """What was cached of all its prompts together."""
    async with running_stack(transport=transport) as stack:
        assert cached(await stack.complete([PROMPT, OTHER])) == 0
        await forget(stack)
        await stack.complete(PROMPT)
        assert cached(await stack.complete([PROMPT, OTHER])) == WHOLE_BLOCKS


async def test_a_prefill_leg_that_ends_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both legs are sent at once, decode may answer first."""
    monkeypatch.setattr(transfer, "_ANSWER_GRACE_S", 5.0)
    async with running_stack(transport="mooncake") as stack:
        await stack.complete(PROMPT)
        await forget(stack, "decode")
        engine = stack.prefill[0].engine

        async def late(scope: Scope, receive: Receive, send: Send) -> bool:
            async def later(message: Message) -> None:
                await asyncio.sleep(0.05)
                await send(message)

            await engine.own_app(scope, receive, later)
            return True

        engine.hook = late
        assert cached(await stack.complete(PROMPT)) == WHOLE_BLOCKS


async def forget(stack: Stack, *pools: str) -> None:
    """Empty the prefix caches of the pools, of both by default."""
    for replica in (*stack.prefill, *stack.decode):
        if not pools or replica.pool in pools:
            await replica.engine.reset_prefix_cache()
