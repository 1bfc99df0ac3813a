# SPDX-License-Identifier: Apache-2.0
"""Prompts that decode engines compute: how many tokens at a time, on how many replicas, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg.config import GatewayConfig
from disagg.gateway.handoff import local_prefill
from disagg.gateway.replicas.choosing import Seat, replica_view
from disagg.gateway.replicas.membership import DECODE
from disagg.routing.candidates import has_room
from disagg.routing.constraints import num_prompt_tokens
from pools.engine.base import Receive, Scope, Send
from pools.engine.fake.text import encode
from tests.support.gateway_stack import MAX_MODEL_LEN, Replica, Stack, respond, running_stack, until
from tests.support.replica_clients import lonely_member
from tests.unit.disagg.gateway.handoff.test_settling import EXPECTED, PROMPT, cutting
from tests.unit.disagg.gateway.replicas.test_membership import info

NUM_TOKENS = len(encode(PROMPT))
LOCAL = 10_000
"""For `min_handoff_tokens`: every prompt is shorter."""


class Held:
    """Decode legs that wait for `go_on`."""

    def __init__(self, stack: Stack) -> None:
        self.go_on = asyncio.Event()
        self.came: list[str] = []
        for replica in stack.decode:
            replica.engine.hook = self._hook(replica)

    def _hook(self, replica: Replica) -> Any:
        async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
            if "completions" in scope["path"]:
                self.came.append(replica.replica_id)
                await self.go_on.wait()
            return False

        return hook


def taken(stack: Stack) -> list[int]:
    return [member.local_prefill_tokens for member in stack.gateway.membership.members(DECODE)]


def test_any_prompt_fits_an_idle_replica() -> None:
    """The bound is for what runs beside each other."""
    member = lonely_member(info("d0"))
    assert has_room(replica_view(member), 1000, limit=10)
    with Seat(member, 6):
        assert has_room(replica_view(member), 4, limit=10) and not has_room(replica_view(member), 5, limit=10)
        with Seat(member, 4):
            assert not has_room(replica_view(member), 1, limit=10)
    assert member.local_prefill_tokens == member.num_in_flight == 0


def test_tokens_of_a_request() -> None:
    """All prompts count; without a rendering the size of the body stands for it."""
    assert num_prompt_tokens([[1, 2], [3]], b"x" * 100) == 3
    assert num_prompt_tokens(None, b"x" * 100) == 25
    assert num_prompt_tokens(None, b"x" * 100, max_model_len=7) == 7
    assert num_prompt_tokens([[1, 2], [3]], b"x" * 100, max_model_len=2) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_beyond_the_budget_it_is_429(stream: bool) -> None:
    """Each decode replica takes its share, the next request is refused in OpenAI's shape, and later ones are served."""
    config = GatewayConfig(min_handoff_tokens=LOCAL, local_prefill_tokens=NUM_TOKENS + 1, retry_after_s=7)
    async with running_stack(num_decode=2, config=config) as stack:
        held = Held(stack)
        running = [asyncio.create_task(stack.complete(PROMPT, stream=stream)) for _ in range(2)]
        await until(lambda: len(held.came) == 2)
        assert sorted(held.came) == ["d0", "d1"] and taken(stack) == [NUM_TOKENS] * 2
        assert f'disagg_local_prefill_tokens{{replica="d0"}} {NUM_TOKENS}.0' in stack.gateway.metrics.render().decode()
        refused = await stack.complete(PROMPT, stream=stream)
        assert (refused.status, refused.headers["retry-after"]) == (429, "7")
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert stack.metric("disagg_local_prefills_refused_total") == 1
        assert len(held.came) == 2
        held.go_on.set()
        assert [reply.text for reply in await asyncio.gather(*running)] == [EXPECTED] * 2
        assert taken(stack) == [0, 0]
        assert (await stack.complete(PROMPT)).status == 200


async def test_replicas_that_leave_have_the_same_room() -> None:
    """Neither beside one that stays and is full, nor when all leave, do they take more than their share."""
    config = GatewayConfig(min_handoff_tokens=LOCAL, local_prefill_tokens=NUM_TOKENS + 1, prefill_alone_tokens=0)
    async with running_stack(num_decode=2, config=config) as stack:
        held = Held(stack)
        running = [asyncio.create_task(stack.complete(PROMPT)) for _ in range(2)]
        await until(lambda: len(held.came) == 2)
        for left in ([stack.decode[1].info], []):
            stack.gateway.membership.replace(DECODE, left)
            assert (await stack.complete(PROMPT)).status == 429
        held.go_on.set()
        assert [reply.text for reply in await asyncio.gather(*running)] == [EXPECTED] * 2
        assert len(held.came) == 2


@pytest.mark.parametrize("rate_known", [False, True])
async def test_an_answer_that_is_not_streamed_keeps_room_for_its_prompt_only(
    rate_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives it back when its prompt should be computed, and not a second time with its answer; streams say when."""
    config = GatewayConfig(min_handoff_tokens=LOCAL)
    async with running_stack(config=config) as stack:
        if rate_known:
            stack.gateway.handoff._local_rate.tokens_per_s = NUM_TOKENS / 0.02
        else:
            monkeypatch.setattr(local_prefill, "_UNKNOWN_PREFILL_S", 0.02)
        held = Held(stack)
        running = [asyncio.create_task(stack.complete(PROMPT, stream=True))]
        await until(lambda: len(held.came) == 1)
        running.append(asyncio.create_task(stack.complete(PROMPT)))
        await until(lambda: len(held.came) == 2)
        await until(lambda: taken(stack) == [NUM_TOKENS])
        held.go_on.set()
        assert [reply.text for reply in await asyncio.gather(*running)] == [EXPECTED] * 2
        assert taken(stack) == [0]


async def test_what_could_not_be_rendered_counts_no_more_than_fits_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body full of images is long and its prompt is not."""

    async def unknown(*args: Any) -> None:
        return None

    async with running_stack() as stack:
        monkeypatch.setattr(stack.renderer, "prompts", unknown)
        held = Held(stack)
        running = asyncio.create_task(stack.complete(PROMPT, user="x" * 8 * MAX_MODEL_LEN))
        await until(lambda: held.came)
        assert taken(stack) == [MAX_MODEL_LEN]
        held.go_on.set()
        assert (await running).text == EXPECTED


async def test_room_ends_the_refusals_before_the_answer_does() -> None:
    """A stream gives its room back with its first byte."""
    config = GatewayConfig(min_handoff_tokens=LOCAL, local_prefill_tokens=1)
    async with running_stack(config=config, itl_ms=5) as stack:
        async with stack.streaming(max_tokens=500) as connection:
            assert (await connection.head())[0] == 200
            await connection.chunk()
            assert taken(stack) == [0]
            assert stack.decode[0].engine.stats().num_requests_running == 1
            assert (await stack.complete(PROMPT)).text == EXPECTED
            connection.leave()
        await stack.settled()


async def test_a_short_prompt_still_fits() -> None:
    """What is left of the budget is for whoever fits in."""
    config = GatewayConfig(min_handoff_tokens=LOCAL, local_prefill_tokens=NUM_TOKENS + 5)
    async with running_stack(config=config) as stack:
        held = Held(stack)
        running = [asyncio.create_task(stack.complete(PROMPT)), asyncio.create_task(stack.complete("abc"))]
        await until(lambda: len(held.came) == 2)
        assert (await stack.complete(PROMPT)).status == 429
        held.go_on.set()
        assert [reply.status for reply in await asyncio.gather(*running)] == [200, 200]


async def test_the_budget_holds_without_a_prefill_pool() -> None:
    """Requests whose hand-off failed are under the budget too, and hand-offs never are."""
    config = GatewayConfig(local_prefill_tokens=1)
    async with running_stack(config=config) as stack:
        held = Held(stack)
        handed = [asyncio.create_task(stack.complete(PROMPT)) for _ in range(3)]
        await until(lambda: len(held.came) == 3)
        assert taken(stack) == [0]
        stack.prefill[0].kill()
        running = asyncio.create_task(stack.complete(PROMPT))
        await until(lambda: len(held.came) == 4)
        assert (await stack.complete(PROMPT)).status == 429
        held.go_on.set()
        assert {reply.text for reply in await asyncio.gather(running, *handed)} == {EXPECTED}


async def test_leaving_and_losing_give_room_back() -> None:
    """Neither a client that leaves nor a replica that is lost keeps a share of the budget."""
    config = GatewayConfig(min_handoff_tokens=LOCAL)
    async with running_stack(num_decode=2, config=config) as stack:
        held = Held(stack)
        async with stack.streaming() as connection:
            await until(lambda: held.came)
            connection.leave()
            await until(lambda: taken(stack) == [0, 0])
        held.go_on.set()
        for replica in stack.decode:
            replica.engine.hook = None
        stack.decode[0].engine.hook = cutting(stack.decode[0], kill=True)
        assert [(await stack.complete(PROMPT)).text for _ in range(2)] == [EXPECTED] * 2
        assert taken(stack) == [0, 0]


@pytest.mark.parametrize("fault", ["cut", "answers 500"])
@pytest.mark.parametrize("handed_off", [True, False])
async def test_a_request_that_breaks_engines_does_not_break_them_all(fault: str, handed_off: bool) -> None:
    """After `max_attempts` replicas it is given up; the others never see it."""
    config = GatewayConfig(max_attempts=2, min_handoff_tokens=1 if handed_off else LOCAL)
    async with running_stack(num_decode=4, config=config) as stack:
        for replica in stack.decode:
            replica.engine.hook = cutting(replica, kill=True) if fault == "cut" else respond(500)
        reply = await stack.complete(PROMPT)
        if fault == "cut":
            assert (reply.status, reply.json()["error"]["code"]) == (503, "attempts_exhausted")
            assert "gateway.max_attempts" in reply.json()["error"]["message"]
        else:
            assert reply.status == 500
        assert sum(len(replica.engine.seen) for replica in stack.decode) == 2


async def test_replicas_that_cannot_be_reached_are_no_attempts() -> None:
    """A request that never reached an engine has broken none."""
    config = GatewayConfig(max_attempts=1, min_handoff_tokens=LOCAL)
    async with running_stack(num_decode=4, config=config) as stack:
        for replica in stack.decode[:3]:
            replica.kill()
        await asyncio.sleep(0)
        reply = await stack.complete(PROMPT)
        assert (reply.text, reply.headers["x-disagg-decode"]) == (EXPECTED, "d3")
