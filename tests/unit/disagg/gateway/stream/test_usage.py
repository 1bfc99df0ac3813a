# SPDX-License-Identifier: Apache-2.0
"""`cached_tokens` of an answer: what some engine had before, whichever way the answer came about."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from disagg.config import GatewayConfig
from disagg.gateway.handoff import transfer
from disagg.gateway.handoff.cached import Cached, Reached, of_each
from disagg.gateway.handoff.transfer import PrefillLeg
from disagg.gateway.replicas.membership import Member
from disagg.gateway.stream.usage import CorrectedStream, corrected
from disagg.routing.views import ReplicaInfo
from pools.client.messages import PrefillReply
from pools.engine.base import Message, Receive, Scope, Send
from pools.engine.fake.text import encode
from pools.errors import ReplicaLostError
from tests.support.gateway_stack import TRANSPORTS, Replica, Reply, Stack, respond, running_stack
from tests.unit.disagg.gateway.stream.test_resume import GREEDY, MOMENTS, When, after, armed, streamed

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


COMPLETIONS = "/v1/completions"


async def twice_lost(stack: Stack) -> Reply:
    armed(stack, after(4), after(4))
    return await streamed(stack, COMPLETIONS, **GREEDY)


def lost_when(when: When, how: Callable[[Replica], None] = Replica.cut) -> Callable[[Stack], Awaitable[Reply]]:
    async def ask(stack: Stack) -> Reply:
        armed(stack, when, how=how)
        return await streamed(stack, COMPLETIONS, **GREEDY)

    return ask


async def lost_before_the_first_byte(stack: Stack) -> Reply:
    """Decode is lost in the hand-off, and prefill, which has computed the prompt for it, answers alone."""

    async def killed(scope: Scope, receive: Receive, send: Send) -> bool:
        async def nowhere(message: Message) -> None:
            pass

        await replica.engine.own_app(scope, receive, nowhere)
        replica.kill()
        return True

    [replica] = stack.decode
    replica.engine.hook = killed
    reply = await stack.complete(PROMPT)
    assert reply.headers["x-disagg-decode"] == "p0"
    return reply


async def fails_after_the_read(stack: Stack) -> Reply:
    """The decode replica reads the KV and answers 500, and prefill, which has computed the prompt, answers alone."""
    [replica] = stack.decode

    async def failing(scope: Scope, receive: Receive, send: Send) -> bool:
        async def nowhere(message: Message) -> None:
            pass

        replica.engine.hook = None
        await replica.engine.own_app(scope, receive, nowhere)
        return await respond(500)(scope, receive, send)

    replica.engine.hook = failing
    reply = await stack.complete(PROMPT)
    assert reply.headers["x-disagg-decode"] == "p0"
    return reply


FAULTS: dict[str, tuple[int, Callable[[Stack], Awaitable[Reply]]]] = {
    "resumed": (2, lost_when(after(4))),
    "resumed twice": (2, twice_lost),
    "resumed at prefill": (1, lost_when(after(4), Replica.kill)),
    "lost before usage": (2, lost_when(MOMENTS["before usage"])),
    "lost before the first byte": (1, lost_before_the_first_byte),
    "failed after the read": (1, fails_after_the_read),
}


@TRANSPORT
@pytest.mark.parametrize("fault", FAULTS)
async def test_what_an_earlier_try_brought_is_not_cached(transport: str, fault: str) -> None:
    """Whoever answers in the end: 0 of a new prompt, and of one that prefill had as much as without the fault."""
    num_decode, ask = FAULTS[fault]
    for had_it in (False, True):
        async with running_stack(transport=transport, num_decode=num_decode, itl_ms=1) as stack:
            if had_it:
                await stack.complete(PROMPT)
                await forget(stack, "decode")
            assert cached(await ask(stack)) == (WHOLE_BLOCKS if had_it else 0)


async def test_a_stream_without_a_hand_off_goes_on() -> None:
    """The first replica told nothing: the next one tells what it had, unless the request has been there before."""
    config = GatewayConfig(min_handoff_tokens=1000)
    for num_decode in (1, 2):
        async with running_stack(num_decode=num_decode, itl_ms=1, config=config) as stack:
            for replica in stack.decode:
                await replica.engine.probe(encode(PROMPT))
            armed(stack, after(4))
            assert cached(await streamed(stack, COMPLETIONS, **GREEDY)) == (0 if num_decode == 1 else WHOLE_BLOCKS)


def member(replica_id: str, lmcache: str | None = None) -> Member:
    info = ReplicaInfo(replica_id, "decode", "http://a", "e", "i", 16, 100, lmcache_http_url=lmcache)
    return Member(info, None)  # type: ignore[arg-type]


async def test_whose_figure_counts_after_a_failed_try() -> None:
    """The first one that a prefill leg told, else that of replicas which no try can have brought anything."""

    def leg(replica_id: str, outcome: PrefillReply | Exception) -> PrefillLeg:
        async def ends() -> PrefillReply:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return PrefillLeg(replica_id, member(replica_id), asyncio.ensure_future(ends()))

    def reply(num_cached: int) -> PrefillReply:
        return PrefillReply(200, None, True, num_cached)

    async def figure(*legs: PrefillLeg, decoded: str = "", answering: str = "d1", lmcache: str | None = None) -> int:
        """What counts where the last leg's own decode replica tells 64."""
        reached = Reached()
        for each in legs:
            reached.prefill(each)
        if decoded:
            reached.decode(decoded)
        await asyncio.wait({each.task for each in legs})
        found = reached.cached(member(answering, lmcache), legs[-1])
        return 64 if found is None else found.corrected(64)

    lost, unsent = ReplicaLostError("x"), ReplicaLostError("x", sent=False)
    assert await figure(leg("p0", reply(0))) == 64
    assert await figure(leg("p0", unsent), leg("p1", reply(16))) == 64
    assert await figure(leg("p0", PrefillReply(400)), leg("p1", reply(16))) == 64
    assert await figure(leg("p0", reply(16)), leg("p0", reply(48)), decoded="d0") == 16
    assert await figure(leg("p0", lost), leg("p1", reply(16))) == 64
    assert await figure(leg("p0", lost), leg("p1", reply(16)), lmcache="http://b") == 16
    assert await figure(leg("p0", lost), leg("p1", reply(16)), decoded="d1") == 16
    assert await figure(leg("p0", lost), leg("p0", reply(48))) == 0


@pytest.mark.parametrize(
    ("prompts", "found", "right"),
    [
        (["aaa", "aaa"], [0, 2], [0, 0]),
        (["aaa", "aaa"], [2, 2], [2, 2]),
        (["aab", "aac", "xyz"], [0, 2, 2], [0, 0, 2]),
        (["aab", "aacc"], [2, 3], [2, 3]),
        (["aabb", "aabb", "aabb"], [1, 3, 0], [0, 0, 0]),
        (["a", "aaa"], [0, 2], [0, 0]),
        (["abc", "axy"], [0, 1], [0, 0]),
    ],
)
def test_one_prompt_finds_what_another_brought(prompts: list[str], found: list[int], right: list[int]) -> None:
    """A letter is a block. What two prompts begin with was there before if the engines found it of both."""
    assert of_each([[ord(letter) for letter in prompt] for prompt in prompts], found, block_size=1) == right


@TRANSPORT
async def test_equal_prompts_of_a_list(transport: str) -> None:
    """The second one finds what the first one brought: not cached. Both count where both were there before."""
    async with running_stack(transport=transport) as stack:
        engine, turn = stack.prefill[0].engine, asyncio.Lock()

        async def one_by_one(scope: Scope, receive: Receive, send: Send) -> bool:
            async with turn:
                await engine.own_app(scope, receive, send)
            return True

        engine.hook = one_by_one
        assert cached(await stack.complete([PROMPT, PROMPT])) == 0
        assert cached(await stack.complete([PROMPT, PROMPT])) == 2 * WHOLE_BLOCKS


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
