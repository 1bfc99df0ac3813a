# SPDX-License-Identifier: Apache-2.0
"""Faults of either leg on either transport: what the client gets, and how each hand-off ends in the prefill engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from disagg.config import GatewayConfig
from disagg.gateway.background import Background
from disagg.gateway.handoff import settling, transfer
from disagg.gateway.handoff.settling import Settling, UnderWay
from disagg.gateway.handoff.transfer import PrefillLeg
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.replicas.choosing import Reservation
from disagg.gateway.replicas.membership import Pair
from disagg.routing.views import Decision
from pools.client.replica import ReplicaClient
from pools.engine.base import Receive, Scope, Send
from pools.engine.fake.text import answer, decode, encode
from pools.engine.fake.tiers import FakeSharedCache
from pools.errors import ReplicaLostError
from tests.support.gateway_stack import Hook, Replica, Stack, respond, running_stack, until
from tests.support.replica_clients import lonely_member
from tests.unit.disagg.gateway.replicas.test_membership import info
from transport.handoff_params import HANDOFF_ID, MAX_OFFLOAD_TOKENS, REMOTE_DECODE, REMOTE_PREFILL, STORE

PROMPT = "a prompt longer than one block of KV"
EXPECTED = decode(answer(encode(PROMPT), 8))
BOTH_AT_ONCE = pytest.mark.parametrize("transport", ["nixl-push", "mooncake"])
TRANSPORTS = pytest.mark.parametrize("transport", ["nixl", "nixl-push", "mooncake"])


def once(hook: Hook) -> Hook:
    """The hook for the first completion, the engine itself for the others."""
    used: list[bool] = []

    async def first(scope: Scope, receive: Receive, send: Send) -> bool:
        if used or "completions" not in scope["path"]:
            return False
        used.append(True)
        return await hook(scope, receive, send)

    return first


async def hang(scope: Scope, receive: Receive, send: Send) -> bool:
    while (await receive())["type"] != "http.disconnect":
        pass
    return True


def cutting(replica: Replica, *, kill: bool) -> Hook:
    """Break the connection while the request is there: the process dies, or lives on."""

    async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
        if kill:
            replica.kill()
        else:
            replica.cut()
        return True

    return hook


def outcomes(stack: Stack) -> list[str]:
    return sorted(outcome for replica in stack.prefill for outcome in replica.engine.outcomes)


def settled(stack: Stack) -> list[str]:
    """Once each: the gateway's own settling and a decode engine's `unread` may come to the same."""
    return list(dict.fromkeys(handoff_id for replica in stack.prefill for handoff_id in replica.engine.settled))


def reason(stack: Stack, handoff_id: str) -> str | None:
    """The gateway's first reason; the decode engine's own word may come before or after it."""
    record = stack.gateway.ledger.find(handoff_id)
    given = (record.reason or "").split("; ") if record is not None else []
    return next((word for word in given if word != "unread"), None)


def is_local(reply: Any) -> bool:
    return bool(reply.headers["x-disagg-prefill"] == "local")


# Decode


@TRANSPORTS
async def test_decode_refuses(transport: Any) -> None:
    """A decode replica that is gone: answered by the other one, the KV given back at once."""
    async with running_stack(num_decode=2, transport=transport) as stack:
        stack.decode[0].kill()
        await asyncio.sleep(0)
        replies = [await stack.complete(PROMPT) for _ in range(2)]
        assert [reply.text for reply in replies] == [EXPECTED] * 2
        assert sorted(map(is_local, replies)) == [False, True]
        await until(lambda: "consumed" in outcomes(stack) and len(settled(stack)) == 1)
        assert reason(stack, settled(stack)[0]) == "decode_lost"
        # With Mooncake the prefill leg may have been stopped before it produced anything.
        assert outcomes(stack) in (["consumed", "released"], ["consumed"])
        await until(lambda: stack.prefill[0].is_idle)


@TRANSPORTS
@pytest.mark.parametrize("kill", [True, False], ids=["process gone", "process lives"])
async def test_decode_resets(transport: Any, kill: bool) -> None:
    """A connection that breaks before the first bytes: answered elsewhere, the KV given back."""
    async with running_stack(num_decode=2, transport=transport) as stack:
        for replica in stack.decode:
            replica.engine.hook = once(cutting(replica, kill=kill)) if replica is stack.decode[0] else None
        replies = [await stack.complete(PROMPT) for _ in range(2)]
        assert [reply.text for reply in replies] == [EXPECTED] * 2
        await until(lambda: len(settled(stack)) == 1)
        assert reason(stack, settled(stack)[0]) == "decode_lost"
        await until(lambda: stack.prefill[0].is_idle)
        assert "expired" not in outcomes(stack)


@TRANSPORTS
async def test_decode_is_late(transport: Any) -> None:
    """A decode replica that lives and is silent may be reading, so the gateway settles nothing; the lease ends it."""
    go_on = asyncio.Event()

    async def stuck(scope: Scope, receive: Receive, send: Send) -> bool:
        await go_on.wait()
        return True

    config = GatewayConfig(first_byte_timeout_s=0.05)
    async with running_stack(num_decode=2, transport=transport, lease_s=1.5, config=config) as stack:
        stack.decode[0].engine.hook = once(stuck)
        replies = [await stack.complete(PROMPT) for _ in range(2)]
        assert [reply.text for reply in replies] == [EXPECTED] * 2
        await until(lambda: outcomes(stack) == ["consumed", "expired"])
        assert not settled(stack)
        go_on.set()


@TRANSPORTS
async def test_decode_is_late_and_says_unread(transport: Any) -> None:
    """A decode engine that was too slow says itself that it read nothing, and the hold ends long before its lease."""
    config = GatewayConfig(first_byte_timeout_s=0.2)
    timing = {"max_num_seqs": 1, "itl_ms": 5}
    async with running_stack(num_decode=2, transport=transport, config=config, **timing) as stack:
        # Kept, or the garbage collector ends them.
        streams = await asyncio.gather(*(busy(stack) for _ in range(2)))
        reply = asyncio.create_task(stack.complete(PROMPT))
        await until(lambda: any(r.engine.happened("unread") for r in stack.decode))
        await until(lambda: len(settled(stack)) == 1)
        await until(lambda: "released" in outcomes(stack))
        for task in (reply, *streams):
            task.cancel()
        await asyncio.gather(reply, *streams, return_exceptions=True)


async def busy(stack: Stack) -> asyncio.Task[Any]:
    """A stream that runs on for as long as the stack does."""
    running = asyncio.create_task(stack.complete(PROMPT, stream=True, max_tokens=1000))
    before = stack.metric("disagg_streams_total", path="splice")
    await until(lambda: running.done() or stack.metric("disagg_streams_total", path="splice") > before)
    return running


@TRANSPORTS
async def test_decode_rejects(transport: Any) -> None:
    """A refusal is the answer, and the KV is given back."""
    async with running_stack(transport=transport) as stack:
        stack.decode[0].engine.hook = once(respond(400))
        reply = await stack.complete(PROMPT)
        assert (reply.status, reply.headers["x-disagg-prefill"]) == (400, "p0")
        await until(lambda: len(settled(stack)) == 1)
        assert reason(stack, settled(stack)[0]) == "decode_rejected"
        await stack.settled()
        # With Mooncake the prefill leg may have been stopped before it produced anything.
        assert outcomes(stack) == ["released"] or (transport != "nixl" and not outcomes(stack))


@TRANSPORTS
@pytest.mark.parametrize("status", [500, 503])
async def test_decode_fails_before_reading(transport: Any, status: int) -> None:
    """A 5xx is tried elsewhere, and the KV is given back after the grace time."""
    async with running_stack(num_decode=2, transport=transport) as stack:
        stack.decode[0].engine.hook = once(respond(status))
        replies = [await stack.complete(PROMPT) for _ in range(2)]
        assert [reply.text for reply in replies] == [EXPECTED] * 2
        await until(lambda: len(settled(stack)) == 1)
        assert reason(stack, settled(stack)[0]) == "decode_error"
        await stack.settled()
        assert "expired" not in outcomes(stack)


@TRANSPORTS
async def test_decode_fails_after_reading(transport: Any) -> None:
    """A 5xx after the read: the hold has ended as consumed, and settling changes nothing."""
    async with running_stack(transport=transport) as stack:
        engine = stack.decode[0].engine

        async def read_and_fail(scope: Scope, receive: Receive, send: Send) -> bool:
            async def nowhere(message: Any) -> None:
                pass

            await engine.own_app(scope, receive, nowhere)
            return await respond(500)(scope, receive, send)

        engine.hook = once(read_and_fail)
        assert (await stack.complete(PROMPT)).text == EXPECTED
        await until(lambda: len(settled(stack)) == 1)
        await stack.settled()
        assert outcomes(stack) == ["consumed"]


async def test_settling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill replica that cannot be told keeps its KV until the lease ends, and nothing else breaks."""
    async with running_stack(lease_s=0.4) as stack:

        async def broken(handoff_ids: Any) -> None:
            raise ValueError("no")

        monkeypatch.setattr(stack.prefill[0].engine, "settle", broken)
        stack.decode[0].engine.hook = once(respond(400))
        assert (await stack.complete(PROMPT)).status == 400
        assert (await stack.complete(PROMPT)).text == EXPECTED
        await until(lambda: outcomes(stack) == ["consumed", "expired"])


@TRANSPORTS
async def test_a_probe_fails(transport: Any) -> None:
    """A prompt that decode refused to pull is computed there, and its KV given back."""
    async with running_stack(transport=transport) as stack:
        engine = stack.decode[0].engine

        async def refuse(*args: Any, **kwargs: Any) -> Any:
            raise ValueError("no")

        engine.probe = refuse  # type: ignore[method-assign]
        reply = await stack.complete(PROMPT, n=2)
        assert (reply.status, reply.text) == (200, EXPECTED)
        await until(lambda: len(settled(stack)) == 1)
        await stack.settled()
        assert "expired" not in outcomes(stack)


# Prefill, with decode waiting for it


@pytest.mark.parametrize("kill", [True, False], ids=["process gone", "process lives"])
async def test_prefill_is_lost_while_decode_waits(kill: bool) -> None:
    """Mooncake: the decode leg is closed at once and the request tried with the other prefill replica."""
    async with running_stack(num_prefill=2, transport="mooncake") as stack:
        first = stack.prefill[0]
        first.engine.hook = once(cutting(first, kill=kill))
        stack.prefill[1].engine.hook = None
        replies = [await stack.complete(PROMPT) for _ in range(2)]
        assert [(reply.text, is_local(reply)) for reply in replies] == [(EXPECTED, False)] * 2
        assert stack.metric("disagg_leg_retries_total", leg="prefill") >= 1
        await until(lambda: stack.decode[0].is_idle)
        assert len(stack.decode[0].engine.happened("unread")) <= 1


@pytest.mark.parametrize("status", [500, 503, 400, 200])
async def test_prefill_answers_badly_while_decode_waits(status: int) -> None:
    """Mooncake: whatever is no finished leg ends the decode leg; the only replica's request is answered locally."""
    async with running_stack(transport="mooncake") as stack:
        stack.prefill[0].engine.hook = once(respond(status, b'{"choices": [{"finish_reason": "abort"}]}'))
        reply = await stack.complete(PROMPT)
        assert (reply.text, is_local(reply)) == (EXPECTED, True)
        reasons = {500: "prefill_lost", 503: "prefill_lost", 400: "prefill_refused", 200: "prefill_offered_nothing"}
        assert stack.metric("disagg_local_prefills_total", reason=reasons[status]) == 1
        await stack.settled()
        assert (await stack.complete(PROMPT)).headers["x-disagg-prefill"] == "p0"


async def test_prefill_is_late_while_decode_waits() -> None:
    """Mooncake: at the deadline both legs end, and decode computes the prompt itself."""
    async with running_stack(transport="mooncake", config=GatewayConfig(prefill_timeout_s=0.1)) as stack:
        engine = stack.prefill[0].engine
        engine.hook = once(hang)
        reply = await stack.complete(PROMPT)
        assert (reply.text, is_local(reply)) == (EXPECTED, True)
        await until(lambda: engine.aborts == [engine.seen[0].headers["x-request-id"]])
        await until(lambda: stack.decode[0].engine.happened("unread"))
        assert reason(stack, engine.aborts[0]) == "abandoned"
        assert stack.metric("disagg_local_prefills_total", reason="prefill_timeout") == 1
        stack.prefill[0].cut()


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 2}], ids=["whole", "streamed", "primed"])
async def test_prefill_has_a_backlog(more: dict[str, Any]) -> None:
    """Mooncake: decode waits for a lease and computes the prompt; the prefill leg, still queued, is stopped then."""
    async with running_stack(transport="mooncake", lease_s=0.2, max_num_seqs=1, itl_ms=5) as stack:
        engine = stack.prefill[0].engine
        engine.hook = once(hang)
        reply = await stack.complete(PROMPT, **more)
        assert (reply.status, reply.text) == (200, EXPECTED)
        leg_id = engine.seen[0].headers["x-request-id"]
        await until(lambda: engine.aborts == [leg_id] and settled(stack) == [leg_id])
        assert reason(stack, leg_id) == "decode_did_not_wait"
        assert stack.metric("disagg_local_prefills_total", reason="decode_did_not_wait") == 1
        stack.prefill[0].cut()


@pytest.mark.parametrize("stream", [False, True])
async def test_decode_is_faster_than_the_prefill_answer(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Mooncake: an answer made of KV that arrived, a moment before the prefill leg's own answer, stops nothing."""
    monkeypatch.setattr(transfer, "_ANSWER_GRACE_S", 0.5)
    async with running_stack(transport="mooncake") as stack:
        engine = stack.prefill[0].engine

        async def late(scope: Scope, receive: Receive, send: Send) -> bool:
            async def slow(message: Any) -> None:
                if message["type"] == "http.response.start":
                    await asyncio.sleep(0.1)
                await send(message)

            await engine.own_app(scope, receive, slow)
            return True

        engine.hook = once(late)
        reply = await stack.complete(PROMPT, stream=stream)
        assert (reply.text, is_local(reply)) == (EXPECTED, False)
        leg_id = engine.seen[0].headers["x-request-id"]
        # A whole answer waits for the leg, which says what prefill had cached.
        assert stack.gateway.membership.members("prefill")[0].num_in_flight == stream, "the leg is not answered yet"
        await stack.settled()
        await asyncio.sleep(0.05)
        assert (outcomes(stack), engine.aborts, settled(stack)) == (["consumed"], [], [])
        assert not reason(stack, leg_id)
        assert stack.metric("disagg_local_prefills_total", reason="decode_did_not_wait") in (None, 0)


async def test_a_refused_request_is_aborted_once() -> None:
    """Mooncake: decode's refusal stops a prefill leg that runs, and nothing else does so a second time."""
    async with running_stack(transport="mooncake") as stack:
        engine = stack.prefill[0].engine
        engine.hook = once(hang)
        stack.decode[0].engine.hook = once(respond(400))
        assert (await stack.complete(PROMPT)).status == 400
        leg_id = engine.seen[0].headers["x-request-id"]
        await until(lambda: settled(stack) == [leg_id])
        await asyncio.sleep(0.1)
        assert (engine.aborts, reason(stack, leg_id)) == ([leg_id], "decode_rejected")
        stack.prefill[0].cut()


async def test_both_legs_run_at_once() -> None:
    """Mooncake: decode has the request while prefill computes, and only one engine's time is spent on the prompt."""
    async with running_stack(transport="mooncake") as stack:
        go_on = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> bool:
            await go_on.wait()
            return False

        stack.prefill[0].engine.hook = slow
        reply = asyncio.create_task(stack.complete(PROMPT))
        await until(lambda: stack.decode[0].engine.stats().num_requests_running == 1)
        assert not outcomes(stack)
        go_on.set()
        assert (await reply).text == EXPECTED
        prefill, decode_leg = stack.prefill[0].engine.seen[-1], stack.decode[0].engine.seen[-1]
        leg_id = prefill.headers["x-request-id"]
        offered, taken = prefill.body["kv_transfer_params"], decode_leg.body["kv_transfer_params"]
        assert offered == {
            **REMOTE_DECODE,
            "transfer_id": leg_id,
            HANDOFF_ID: leg_id,
        }
        assert taken == {
            **REMOTE_PREFILL,
            "remote_engine_id": stack.prefill[0].engine.engine_id,
            "remote_bootstrap_addr": stack.prefill[0].engine.kv_source["remote_bootstrap_addr"],
            "transfer_id": leg_id,
            HANDOFF_ID: leg_id,
        }
        await until(lambda: outcomes(stack) == ["consumed"])


async def test_nixl_pushes_with_both_legs_at_once() -> None:
    """NIXL push: decode has the request while prefill computes; it is told where to register, prefill only the id."""
    async with running_stack(transport="nixl-push") as stack:
        go_on = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> bool:
            await go_on.wait()
            return False

        stack.prefill[0].engine.hook = slow
        reply = asyncio.create_task(stack.complete(PROMPT))
        await until(lambda: stack.decode[0].engine.stats().num_requests_running == 1)
        go_on.set()
        assert (await reply).text == EXPECTED
        prefill, decode_leg = stack.prefill[0].engine.seen[-1], stack.decode[0].engine.seen[-1]
        leg_id = prefill.headers["x-request-id"]
        assert prefill.body["kv_transfer_params"] == {**REMOTE_DECODE, HANDOFF_ID: leg_id}
        assert decode_leg.body["kv_transfer_params"] == {
            **REMOTE_PREFILL,
            **stack.prefill[0].engine.kv_source,
            "remote_request_id": leg_id,
            HANDOFF_ID: leg_id,
        }
        await until(lambda: outcomes(stack) == ["consumed"])


@BOTH_AT_ONCE
async def test_the_same_answers(transport: str) -> None:
    """Handed off and primed answers over 2 x 2, whole and streamed, chat and completion; every pair is warm."""
    async with running_stack(num_prefill=2, num_decode=2, transport=transport) as stack:
        replies = [await stack.complete(PROMPT), await stack.complete(PROMPT, stream=True)]
        replies += [await stack.complete(PROMPT, n=2), await stack.complete([PROMPT, "another one"], stream=True)]
        assert {reply.text for reply in replies} == {EXPECTED}
        assert not any(map(is_local, replies))
        assert (await stack.chat()).text == (await stack.chat(stream=True)).text
        await stack.settled()
        assert set(outcomes(stack)) == {"consumed"}
        assert not settled(stack)


async def test_a_restarted_replica_publishes_where_its_kv_is() -> None:
    """Mooncake: what it published goes on to serve after a failed leg, and is another one after a restart."""
    async with running_stack(transport="mooncake") as stack:
        published = stack.prefill[0].engine.kv_source
        assert stack.gateway.membership.members("prefill")[0].info.kv_source == published
        stack.prefill[0].engine.hook = once(respond(500))
        await stack.complete(PROMPT)
        assert (await stack.complete(PROMPT)).headers["x-disagg-prefill"] == "p0"
        await stack.prefill[0].restart()
        stack.announce()
        await stack.warmed()
        assert (await stack.complete(PROMPT)).headers["x-disagg-prefill"] == "p0"
        taken = stack.decode[0].engine.seen[-1].body["kv_transfer_params"]
        assert taken["remote_engine_id"] == stack.prefill[0].engine.engine_id != published["remote_engine_id"]


async def test_a_replica_that_does_not_say_where_its_kv_is() -> None:
    """Mooncake: nothing is sent to it, and decode computes the prompt itself."""
    async with running_stack(transport="mooncake") as stack:
        member = stack.gateway.membership.members("prefill")[0]
        member.info = replace(member.info, kv_source={})
        reply = await stack.complete(PROMPT)
        assert (reply.text, is_local(reply)) == (EXPECTED, True)
        assert not stack.prefill[0].engine.seen


# What the client says about storing


@TRANSPORTS
async def test_disagg_store_reaches_prefill_only(transport: Any) -> None:
    """The client's word is in the prefill leg's parameters, and no engine sees the field, whatever the way."""
    async with running_stack(transport=transport) as stack:
        for store in ("never", "always"):
            assert (await stack.complete(PROMPT, disagg_store=store)).text == EXPECTED
            assert (await stack.complete(PROMPT, disagg_store=store, n=2)).text == EXPECTED
            assert (await stack.chat(disagg_store=store)).status == 200
        offers = [seen.body["kv_transfer_params"] for seen in stack.prefill[0].engine.seen]
        assert [offer.get(STORE) for offer in offers] == ["never"] * 3 + ["always"] * 3
        assert [offer.get(MAX_OFFLOAD_TOKENS) for offer in offers] == [0] * 3 + [None] * 3
        stack.gateway.membership.replace("prefill", [])
        assert is_local(await stack.complete(PROMPT, disagg_store="never"))
        for seen in stack.prefill[0].engine.seen + stack.decode[0].engine.seen:
            assert "disagg_store" not in json.dumps(seen.body)


@pytest.mark.parametrize("value", ["sometimes", "", None, True, 0, ["never"], {"never": 1}])
async def test_disagg_store_is_checked(value: Any) -> None:
    """Anything else is a 400 in the OpenAI shape, on every route."""
    async with running_stack() as stack:
        for reply in (await stack.complete(PROMPT, disagg_store=value), await stack.chat(disagg_store=value)):
            assert reply.status == 400
            error = reply.json()["error"]
            assert (error["param"], error["type"], error["code"]) == ("disagg_store", "invalid_request_error", None)
        assert not stack.prefill[0].engine.seen + stack.decode[0].engine.seen


@TRANSPORTS
async def test_what_nobody_read_is_found_again(transport: Any) -> None:
    """KV of a rejected request is rescued, and the ledger sees that a later request loads it."""
    # The other prefill replica has the prompt in no memory of its own.
    async with running_stack(num_prefill=2, transport=transport, shared_cache=FakeSharedCache(16)) as stack:

        async def after_prefill(scope: Scope, receive: Receive, send: Send) -> bool:
            await until(lambda: any(replica.engine.happened("produced") for replica in stack.prefill))
            return await respond(400)(scope, receive, send)

        stack.decode[0].engine.hook = once(after_prefill)
        assert (await stack.complete(PROMPT)).status == 400
        ledger = stack.gateway.ledger
        await until(lambda: ledger.totals["rescued"].count == 1)
        assert (await stack.complete(PROMPT)).text == EXPECTED
        await until(lambda: ledger.totals["reused"].count == 1 and ledger.totals["consumed"].count == 1)
        assert ledger.totals["reused"].tokens == len(encode(PROMPT)) // 16 * 16
        assert ledger.num_open == 0 and ledger.balanced


# The parts


def test_only_the_newest_holders_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of who holds what is bounded, and ids of others are ignored."""
    monkeypatch.setattr(settling, "_MAX_REMEMBERED", 3)
    spawned: list[Any] = []

    class Spawning(Background):
        def spawn(self, coroutine: Any) -> Any:
            coroutine.close()
            spawned.append(coroutine)

    keeper = Settling(Spawning(), Ledger())
    pair = Pair(lonely_member(info("p0")), lonely_member(info("d0")))
    for i in range(5):
        keeper.expect(f"g-{i}", pair, "r", 9)
    for i in range(5):
        keeper.settle(f"g-{i}")
    keeper.settle("other-1")
    assert len(spawned) == 3


@pytest.mark.parametrize(
    ("sent", "gone", "settles"),
    [(False, True, True), (False, False, True), (True, True, True), (True, False, False)],
    ids=["refused", "no connection in time", "reset", "late"],
)
async def test_a_lost_decode_leg_is_settled_unless_it_may_read(
    sent: bool, gone: bool, settles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a decode engine that was sent the request and is merely late keeps the gateway from settling."""
    told: list[str] = []

    async def settle(self: ReplicaClient, handoff_ids: Sequence[str]) -> None:
        told.extend(handoff_ids)

    monkeypatch.setattr(ReplicaClient, "settle", settle)

    async def ended() -> Any:
        return None

    background = Background()
    keeper = Settling(background, Ledger())
    pair = Pair(lonely_member(info("p0")), lonely_member(info("d0")))
    leg = PrefillLeg("g-1", pair.prefill, asyncio.ensure_future(ended()))
    await leg.task
    keeper.expect("g-1", pair, "r", 9)
    under_way = UnderWay(pair, leg, 0.0, Reservation(Decision("handoff"), pair.prefill, pair.decode))
    keeper.decode_lost(under_way, ReplicaLostError("x", sent=sent, gone=gone))
    await background.close(5)
    assert told == (["g-1"] if settles else [])
