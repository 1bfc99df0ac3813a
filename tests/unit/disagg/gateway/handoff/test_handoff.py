# SPDX-License-Identifier: Apache-2.0
"""Requests over two prefill and two decode replicas: the same answer by every way, and what a lost replica costs."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from disagg.config import GatewayConfig
from disagg.gateway.handoff import warm
from pools.engine.base import Message, Receive, Scope, Send
from pools.engine.fake.text import answer, decode, encode
from tests.support.gateway_stack import FAST, JSON_HEADERS, Hook, Replica, Stack, respond, running_stack, until

PROMPT = "a prompt longer than one block of KV"
EXPECTED = decode(answer(encode(PROMPT), 8))
FAIL = respond(500, b'{"error": {"message": "x", "type": "InternalServerError", "param": null, "code": 500}}')


def dies(replica: Replica, *, after_writes: int | None = None) -> Hook:
    """The replica dies on its next completion: at once, or after so many writes of its answer."""

    async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
        left = after_writes

        async def counted(message: Message) -> None:
            nonlocal left
            await send(message)
            left = (left or 0) - 1
            if left == 0:
                # What was written has to leave before the connection breaks.
                await asyncio.sleep(0.02)
                replica.kill()

        if after_writes is None:
            replica.kill()
        else:
            await replica.engine.own_app(scope, receive, counted)
        return True

    return hook


async def hang(scope: Scope, receive: Receive, send: Send) -> bool:
    while (await receive())["type"] != "http.disconnect":
        pass
    return True


def first_used(replicas: list[Replica], **how: Any) -> list[Replica]:
    """Whichever replica is used first dies of it; it is in the returned list then."""
    dead: list[Replica] = []

    def arm(replica: Replica) -> None:
        death = dies(replica, **how)

        async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
            if dead or "completions" not in scope["path"]:
                return False
            dead.append(replica)
            return await death(scope, receive, send)

        replica.engine.hook = hook

    for replica in replicas:
        arm(replica)
    return dead


def alive(stack: Stack, dead: list[Replica]) -> bool:
    return all(r.is_idle for r in stack.replicas if r not in dead)


async def test_every_way_gives_the_same_answer() -> None:
    """Handed off, primed and local answers are alike, whole and streamed."""
    async with running_stack(num_prefill=2, num_decode=2) as stack:
        handed = [await stack.complete(PROMPT), await stack.complete(PROMPT, stream=True)]
        primed = [await stack.complete(PROMPT, n=2), await stack.complete([PROMPT, "another one"], stream=True)]
        chats = [await stack.chat(), await stack.chat(stream=True), await stack.chat(n=2)]
        stack.gateway.membership.replace("prefill", [])
        local = [await stack.complete(PROMPT), await stack.complete(PROMPT, stream=True, n=2)]
        chats += [await stack.chat(), await stack.chat(stream=True)]
        assert {reply.text for reply in handed + primed + local} == {EXPECTED}
        assert len({reply.text for reply in chats}) == 1
        assert [r.headers["x-disagg-prefill"] == "local" for r in handed + primed + local] == [False] * 4 + [True] * 2
        assert all(reply.status == 200 for reply in handed + primed + local + chats)
        assert len(primed[0].json()["choices"]) == 2
        for mode, number in {"handoff": 2, "primed": 2, "local": 2}.items():
            assert stack.metric("disagg_requests_total", endpoint="completions", mode=mode, code="200") == number
        await stack.settled()


async def test_handed_off_prompts_are_not_computed_twice() -> None:
    """A hand-off and a primed list leave decode all but the last token of each prompt."""
    async with running_stack() as stack:
        decode_engine = stack.decode[0].engine
        for reply in (
            await stack.complete(PROMPT * 3),
            await stack.complete(["one " * 20, "two " * 20, "three " * 20]),
        ):
            assert reply.status == 200
        before = decode_engine.stats()
        assert before.num_handoffs_admitted_total == 5
        assert before.nixl_num_failed_transfers_total == 0
        assert stack.prefill[0].engine.outcomes == ["consumed"] * 4
        await stack.settled()


async def test_all_four_pairs_are_used() -> None:
    """Sequential requests take turns over 2 x 2, and each engine sees what its leg should hold."""
    async with running_stack(num_prefill=2, num_decode=2) as stack:
        replies = [await stack.complete(PROMPT, cache_salt="tenant", min_tokens=3, stop=["never"]) for _ in range(8)]
        pairs = Counter((r.headers["x-disagg-prefill"], r.headers["x-disagg-decode"]) for r in replies)
        assert pairs == {(p, d): 2 for p in ("p0", "p1") for d in ("d0", "d1")}
        for replica in stack.prefill:
            for seen in replica.engine.seen:
                assert seen.body.keys() == {
                    "model",
                    "prompt",
                    "max_tokens",
                    "temperature",
                    "ignore_eos",
                    "kv_transfer_params",
                    "cache_salt",
                }
                assert seen.body["prompt"] == encode(PROMPT)
        leg_ids = [seen.headers["x-request-id"] for r in stack.prefill for seen in r.engine.seen]
        assert len(set(leg_ids)) == 8
        given = {json.dumps(s.body["kv_transfer_params"]) for r in stack.decode for s in r.engine.seen}
        assert len(given) == 8


async def test_concurrent_requests_spread() -> None:
    """Eight requests at once give every replica its share."""
    async with running_stack(num_prefill=2, num_decode=2, itl_ms=5) as stack:
        replies = await asyncio.gather(*(stack.complete(PROMPT, stream=True) for _ in range(8)))
        assert {reply.text for reply in replies} == {EXPECTED}
        assert Counter(r.headers["x-disagg-decode"] for r in replies) == {"d0": 4, "d1": 4}
        assert Counter(r.headers["x-disagg-prefill"] for r in replies) == {"p0": 4, "p1": 4}
        await stack.settled()


async def test_prefill_replica_dies_mid_leg() -> None:
    """The leg is retried on the other prefill replica; the client sees nothing."""
    async with running_stack(num_prefill=2, num_decode=2) as stack:
        dead = first_used(stack.prefill)
        replies = [await stack.complete(PROMPT) for _ in range(3)]
        survivor = next(r for r in stack.prefill if r not in dead)
        assert [r.text for r in replies] == [EXPECTED] * 3
        assert {r.headers["x-disagg-prefill"] for r in replies} == {survivor.replica_id}
        assert stack.metric("disagg_leg_retries_total", leg="prefill") >= 1
        await until(lambda: alive(stack, dead))


async def test_whole_prefill_pool_gone() -> None:
    """Decode computes the prompts itself; health says so and stays good."""
    async with running_stack(num_prefill=2, num_decode=2) as stack:
        for replica in stack.prefill:
            replica.kill()
        replies = [await stack.complete(PROMPT), await stack.complete(PROMPT, stream=True), await stack.chat(n=2)]
        assert [r.headers["x-disagg-prefill"] for r in replies] == ["local"] * 3
        assert [r.status for r in replies] == [200] * 3
        assert [r.text for r in replies[:2]] == [EXPECTED] * 2
        health = await stack.call("GET", "/health")
        assert (health.status, health.json()["pools"]["prefill"]) == (200, 0)
        await until(lambda: alive(stack, stack.prefill))


@pytest.mark.parametrize("status", [500, 503])
async def test_prefill_answers_5xx(status: int) -> None:
    """One failing prefill replica is passed over, two mean local prefill."""
    async with running_stack(num_prefill=2) as stack:
        stack.prefill[0].engine.hook = respond(status, b"{}")
        replies = [await stack.complete(PROMPT) for _ in range(2)]
        assert [r.headers["x-disagg-prefill"] for r in replies] == ["p1", "p1"]
        stack.prefill[1].engine.hook = respond(status, b"{}")
        reply = await stack.complete(PROMPT)
        assert (reply.text, reply.headers["x-disagg-prefill"]) == (EXPECTED, "local")
        assert stack.metric("disagg_local_prefills_total", reason="prefill_lost") == 1


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (400, b"{}", "prefill_refused"),
        (200, b"no json", "prefill_offered_nothing"),
        (200, b"[1]", "prefill_offered_nothing"),
        (200, b"{}", "prefill_offered_nothing"),
    ],
    ids=["400", "no json", "no object", "no parameters"],
)
async def test_prefill_offers_nothing(status: int, body: bytes, reason: str) -> None:
    """A prefill answer without hand-off parameters costs nothing but time."""
    async with running_stack() as stack:
        stack.prefill[0].engine.hook = respond(status, body)
        for reply in (await stack.complete(PROMPT), await stack.complete(PROMPT, n=2)):
            assert (reply.status, reply.text, reply.headers["x-disagg-prefill"]) == (200, EXPECTED, "local")
        assert stack.metric("disagg_local_prefills_total", reason=reason) == 2


async def test_prefill_timeout() -> None:
    """A silent prefill replica is given up at the deadline, aborted there, and decode computes the prompt."""
    async with running_stack(config=GatewayConfig(prefill_timeout_s=0.1)) as stack:
        engine = stack.prefill[0].engine
        engine.hook = hang
        reply = await stack.complete(PROMPT)
        assert (reply.text, reply.headers["x-disagg-prefill"]) == (EXPECTED, "local")
        assert stack.metric("disagg_local_prefills_total", reason="prefill_timeout") == 1
        await until(lambda: engine.aborts == [engine.seen[0].headers["x-request-id"]])
        stack.prefill[0].cut()


async def test_late_prefill_gives_its_kv_back() -> None:
    """A leg that finishes after its deadline all the same has its KV given back when it is produced."""
    async with running_stack(config=GatewayConfig(prefill_timeout_s=0.05)) as stack:
        engine = stack.prefill[0].engine
        go_on = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> bool:
            await go_on.wait()
            return False

        engine.hook = slow
        reply = await stack.complete(PROMPT)
        assert (reply.text, reply.headers["x-disagg-prefill"]) == (EXPECTED, "local")
        await until(lambda: engine.settled)
        assert engine.aborts == engine.settled == [engine.seen[0].headers["x-request-id"]]
        assert not engine.outcomes
        go_on.set()
        await until(lambda: engine.outcomes == ["released"])
        await stack.settled()


async def test_decode_refuses_the_connection() -> None:
    """The other decode replica answers, and the KV that was meant for the first is given back."""
    async with running_stack(num_prefill=2, num_decode=2) as stack:
        stack.decode[0].kill()
        await asyncio.sleep(0)
        replies = [await stack.complete(PROMPT, stream=i % 2 == 0) for i in range(4)]
        assert [r.text for r in replies] == [EXPECTED] * 4
        assert {r.headers["x-disagg-decode"] for r in replies} == {"d1"}
        await until(lambda: alive(stack, stack.decode[:1]))
        assert not stack.gateway.membership.members("decode")[0].reachable


async def test_decode_dies_before_the_first_byte() -> None:
    """The head of a stream is no commitment: the other decode replica answers."""
    for writes in (None, 1):
        async with running_stack(num_decode=2) as stack:
            dead = first_used(stack.decode, after_writes=writes)
            reply = await stack.complete(PROMPT, stream=True)
            assert (reply.status, reply.text, len(dead)) == (200, EXPECTED, 1)
            assert reply.headers["x-disagg-decode"] != dead[0].replica_id
            assert reply.headers["x-disagg-prefill"] == "local"
            assert stack.metric("disagg_leg_retries_total", leg="decode") == 1


async def test_decode_dies_before_a_whole_answer() -> None:
    """An answer that is not streamed can be had again elsewhere until its last byte."""
    async with running_stack(num_decode=2) as stack:
        dead = first_used(stack.decode, after_writes=1)
        reply = await stack.complete(PROMPT)
        assert (reply.status, reply.text, len(dead)) == (200, EXPECTED, 1)


@pytest.mark.parametrize("spliced", [True, False], ids=["splice", "asgi"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_decode_dies_mid_stream(spliced: bool, path: str) -> None:
    """A stream that cannot be resumed ends with an OpenAI error event and `[DONE]`; the connection stays usable."""
    async with running_stack(num_decode=2, spliced=spliced, itl_ms=5) as stack:
        first_used(stack.decode, after_writes=4)
        async with stack.streaming(path, max_tokens=50, seed=1) as connection:
            reply = await connection.reply()
            assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream")
            *tokens, error, done = reply.events
            assert done == "[DONE]"
            assert len(tokens) == 3 and all("choices" in json.loads(token) for token in tokens)
            assert json.loads(error)["error"].keys() == {"message", "type", "param", "code"}
            assert json.loads(error)["error"]["code"] == "replica_lost"
            connection.writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await connection.reply()).status == 200
        assert stack.metric("disagg_broken_streams_total") == 1
        assert stack.metric("disagg_streams_total", path="splice" if spliced else "asgi") == 1


async def test_decode_answers_5xx() -> None:
    """Another decode replica is asked; when all fail, the engine's own answer is passed on."""
    async with running_stack(num_decode=2, config=GatewayConfig(prefill_alone_tokens=0)) as stack:
        stack.decode[0].engine.hook = FAIL
        replies = [await stack.complete(PROMPT) for _ in range(3)]
        assert [r.text for r in replies] == [EXPECTED] * 3
        stack.decode[1].engine.hook = FAIL
        reply = await stack.complete(PROMPT)
        assert (reply.status, reply.json()["error"]["type"]) == (500, "InternalServerError")


@pytest.mark.parametrize("fields", [{}, {"n": 2}], ids=["handed off", "primed"])
async def test_who_answered_5xx_is_not_asked_again(fields: dict[str, Any]) -> None:
    """While there is another replica, however busy, the same request goes there."""
    async with running_stack(num_decode=2) as stack:
        stack.decode[0].engine.hook = FAIL
        stack.gateway.membership.members("decode")[1].num_in_flight = 9
        reply = await stack.complete(PROMPT, **fields)
        assert (reply.status, reply.text) == (200, EXPECTED)
        assert (reply.headers["x-disagg-decode"], reply.headers["x-disagg-prefill"]) == ("d1", "local")
        assert [seen.path for seen in stack.decode[0].engine.seen if "completions" in seen.path] == ["/v1/completions"]
        assert stack.metric("disagg_local_prefills_total", reason="decode_error") == 1


@pytest.mark.parametrize("fields", [{}, {"n": 2}], ids=["handed off", "primed"])
async def test_the_only_replica_is_asked_again_after_5xx(fields: dict[str, Any]) -> None:
    """It was the hand-off that it could not do."""
    async with running_stack() as stack:
        failed: list[bool] = []

        async def once(scope: Scope, receive: Receive, send: Send) -> bool:
            if failed or "completions" not in scope["path"]:
                return False
            failed.append(True)
            return await FAIL(scope, receive, send)

        stack.decode[0].engine.hook = once
        reply = await stack.complete(PROMPT, **fields)
        assert (reply.status, reply.text, failed) == (200, EXPECTED, [True])


async def test_decode_4xx_is_the_answer() -> None:
    """A refusal by the engine reaches the client as it is, without a retry."""
    async with running_stack(num_decode=2) as stack:
        reply = await stack.complete(PROMPT, max_tokens=-1)
        assert (reply.status, reply.json()["error"]["param"]) == (400, "max_tokens")
        assert sum(len(r.engine.seen) for r in stack.decode) == 1
        assert stack.metric("disagg_leg_retries_total", leg="decode") == 0
        await stack.settled()


async def test_overload_is_told() -> None:
    """Beyond the limit of running requests the answer is 503 with Retry-After."""
    async with running_stack(config=GatewayConfig(max_num_requests=1, retry_after_s=7)) as stack:
        go_on = asyncio.Event()

        async def wait() -> None:
            await go_on.wait()

        stack.renderer.before = wait
        first = asyncio.create_task(stack.complete(PROMPT))
        await until(lambda: stack.gateway.in_flight.num == 1)
        refused = await stack.complete(PROMPT)
        go_on.set()
        assert (refused.status, refused.headers["retry-after"]) == (503, "7")
        assert refused.json()["error"].keys() == {"message", "type", "param", "code"}
        assert (await first).status == 200
        assert (await stack.complete(PROMPT)).status == 200


async def test_tokenize_counts() -> None:
    """A route without KV counts as a request too: beyond the limit it is 503, and it holds others off."""
    async with running_stack(config=GatewayConfig(max_num_requests=1, retry_after_s=7)) as stack:
        go_on = asyncio.Event()

        async def wait(scope: Scope, receive: Receive, send: Send) -> bool:
            await go_on.wait()
            return False

        stack.decode[0].engine.hook = wait
        ask = {"model": "tiny", "prompt": "x"}
        first = asyncio.create_task(stack.call("POST", "/tokenize", ask))
        await until(lambda: stack.gateway.in_flight.num == 1)
        refused = [await stack.call("POST", "/detokenize", {"model": "tiny", "tokens": [1]}), await stack.complete()]
        go_on.set()
        assert [(r.status, r.headers["retry-after"]) for r in refused] == [(503, "7")] * 2
        assert (await first).status == (await stack.call("POST", "/tokenize", ask)).status == 200
        assert stack.gateway.in_flight.num == 0


async def test_tokenize_is_tried_a_few_times(caplog: pytest.LogCaptureFixture) -> None:
    """A request that breaks replicas is sent to `max_attempts` of them; where they are is for the log alone."""
    async with running_stack(num_decode=3, config=GatewayConfig(max_attempts=2)) as stack:
        asked: list[Replica] = []
        for replica in stack.decode:

            async def cut(scope: Scope, receive: Receive, send: Send, replica: Replica = replica) -> bool:
                asked.append(replica)
                replica.cut()
                return True

            replica.engine.hook = cut
        headers = [*JSON_HEADERS, ("x-request-id", "mine")]
        reply = await stack.call("POST", "/tokenize", {"model": "tiny", "prompt": "x"}, headers)
        assert (reply.status, reply.json()["error"]["code"], len(asked)) == (503, "attempts_exhausted", 2)
        assert "127.0.0.1" not in reply.body.decode()
        assert sum("request mine was lost" in record.getMessage() for record in caplog.records) == 2


async def test_no_replica_is_told() -> None:
    """Without a replica that may answer everything that needs one is 503 with Retry-After, health included."""
    config = GatewayConfig(retry_after_s=7, prefill_alone_tokens=0)
    async with running_stack(num_prefill=1, num_decode=0, config=config) as stack:
        tokenize = {"model": "tiny", "prompt": "x"}
        replies = [await stack.complete(PROMPT), await stack.chat(stream=True), await stack.complete(PROMPT, n=2)]
        replies += [await stack.call("POST", "/tokenize", tokenize), await stack.call("GET", "/health")]
        assert [(r.status, r.headers.get("retry-after")) for r in replies] == [(503, "7")] * 5
        assert all(r.json()["error"]["code"] == "no_replica_ready" for r in replies[:4])


async def test_new_replica_is_warmed_before_it_is_used() -> None:
    """A decode replica that joins gets its first hand-off only after KV has moved to it."""
    async with running_stack() as stack:
        new = Replica("decode", "d1", FAST)
        await new.start()
        go_on = asyncio.Event()
        probe = new.engine.probe

        async def held(*args: Any, **kwargs: Any) -> Any:
            await go_on.wait()
            return await probe(*args, **kwargs)

        new.engine.probe = held  # type: ignore[method-assign,assignment]
        stack.decode.append(new)
        stack.announce()
        replies = [await stack.complete(PROMPT) for _ in range(3)]
        assert {r.headers["x-disagg-decode"] for r in replies} == {"d0"}
        go_on.set()
        await stack.warmed()
        replies = [await stack.complete(PROMPT) for _ in range(4)]
        assert {r.headers["x-disagg-decode"] for r in replies} == {"d0", "d1"}
        assert new.engine.probes and len(new.engine.probes[0]) == new.info.block_size + 1


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_restarted_replica_is_warmed_again(pool: str) -> None:
    """The same id with a new incarnation moves KV anew before it is used."""
    async with running_stack() as stack:
        replica = (stack.prefill if pool == "prefill" else stack.decode)[0]
        await replica.restart()
        stack.announce()
        assert stack.gateway.membership.num_warm_pairs() == 0
        await stack.warmed()
        assert len(replica.engine.probes) == 1
        reply = await stack.complete(PROMPT)
        assert (reply.text, reply.headers["x-disagg-prefill"]) == (EXPECTED, "p0")


async def test_failed_warming_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair whose KV did not arrive is tried again until it does."""
    monkeypatch.setattr(warm, "_FIRST_RETRY_S", 0.01)
    async with running_stack(num_decode=0, warm=False) as stack:
        new = Replica("decode", "d0", FAST)
        await new.start()
        probe, failures = new.engine.probe, [KeyError("x"), ValueError("y")]

        async def failing(*args: Any, **kwargs: Any) -> Any:
            if failures:
                raise failures.pop()
            return await probe(*args, **kwargs)

        new.engine.probe = failing  # type: ignore[method-assign,assignment]
        stack.decode.append(new)
        stack.announce()
        await stack.warmed()
        assert stack.metric("disagg_pair_warm_attempts_total", outcome="failed") == 2
        assert stack.metric("disagg_pair_warm_attempts_total", outcome="ok") == 1


async def test_unreachable_replica_comes_back() -> None:
    """A replica that refused a connection is asked again and used once it answers."""
    async with running_stack(num_decode=2, config=GatewayConfig(watch_interval_s=0.05)) as stack:
        member = stack.gateway.membership.members("decode")[0]
        stack.gateway.membership.mark_unreachable(member)
        assert (await stack.complete(PROMPT)).headers["x-disagg-decode"] == "d1"
        await until(lambda: member.reachable)
        replies = [await stack.complete(PROMPT) for _ in range(2)]
        assert {r.headers["x-disagg-decode"] for r in replies} == {"d0", "d1"}


async def test_closing_does_not_wait_for_cold_pairs() -> None:
    """A gateway whose replicas never answer stops at once."""
    loop = asyncio.get_running_loop()
    async with running_stack() as stack:
        await stack.join("decode", "d1")
        stack.decode[1].kill()
        await stack.decode[0].restart()
        stack.prefill[0].kill()
        stack.announce()
        began = loop.time()
    assert loop.time() - began < 2


async def test_text_prompts_reach_the_engine_as_tokens() -> None:
    """Completions carry ids on the decode leg, chats keep their messages with ids beside the parameters."""
    async with running_stack() as stack:
        await stack.complete(PROMPT)
        await stack.chat("hello")
        completion, chat = [seen.body for seen in stack.decode[0].engine.seen]
        assert completion["prompt"] == encode(PROMPT)
        assert chat["messages"] == [{"role": "user", "content": "hello"}]
        assert decode(chat["kv_transfer_params"]["prompt_token_ids"]) == "<|user|>hello\n<|assistant|>"


async def test_prompt_lists_are_primed_on_one_decode_replica() -> None:
    """Every prompt of a list is pulled by the replica that answers; none is prefilled for another."""
    async with running_stack(num_prefill=2, num_decode=2) as stack:
        reply = await stack.complete([f"prompt {i} " * 8 for i in range(4)])
        assert (reply.status, len(reply.json()["choices"])) == (200, 4)
        await stack.settled()
        assert not [handoff_id for r in stack.prefill for handoff_id in r.engine.settled]
        assert [outcome for r in stack.prefill for outcome in r.engine.outcomes] == ["consumed"] * 4
        assert all(r.engine.seen for r in stack.prefill)
