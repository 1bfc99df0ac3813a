# SPDX-License-Identifier: Apache-2.0
"""Streams whose decode replica is lost: they go on elsewhere as if nothing had been, or say why they do not."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from disagg.config import GatewayConfig
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.losses import Losses
from disagg.gateway.stream.resume_rules import Cut, resume_plan
from disagg.gateway.stream.resuming import Resumer
from disagg.observability.metrics import Metrics
from pools.engine.base import Message, Receive, Scope, Send
from pools.errors import AttemptsExhaustedError, NoReplicaError, ReplicaLostError
from tests.support.gateway_stack import Replica, Reply, Stack, StubRenderer, respond, running_stack, until

When = Callable[[int, bytes], bool]
"""Whether an engine is lost in place of sending this: the number of chunks it sent, and the chunk."""

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completions", "chat"])
SPLICED = pytest.mark.parametrize("spliced", [True, False], ids=["splice", "asgi"])
TRANSPORTS = pytest.mark.parametrize("transport", ["nixl", "mooncake"])
USAGE = {"stream_options": {"include_usage": True}}
DECODE_ONLY = GatewayConfig(prefill_alone_tokens=0)
GREEDY = {"temperature": 0, "max_tokens": 12, **USAGE}
MOMENTS: dict[str, When] = {
    "after the first chunk": lambda sent, chunk: sent == 1,
    "after the second chunk": lambda sent, chunk: sent == 2,
    "in the middle": lambda sent, chunk: sent == 6,
    "before usage": lambda sent, chunk: b'"choices":[]' in chunk,
    "before [DONE]": lambda sent, chunk: b"[DONE]" in chunk,
}


def after(num_chunks: int) -> When:
    return lambda sent, chunk: sent == num_chunks


def armed(stack: Stack, *moments: When, how: Callable[[Replica], None] = Replica.cut) -> list[Replica]:
    """The next streams' replicas are lost at `moments`, one each; returns those that were."""
    left, lost = list(moments), list[Replica]()

    def arm(replica: Replica) -> None:
        async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
            if "completions" not in scope["path"] or not left:
                return False
            when, sent = left.pop(0), 0

            async def until_lost(message: Message) -> None:
                nonlocal sent
                if replica in lost:
                    return
                if message["type"] == "http.response.body" and when(sent, message.get("body", b"")):
                    lost.append(replica)
                    how(replica)
                    return
                sent += message["type"] == "http.response.body"
                await send(message)

            await replica.engine.own_app(scope, receive, until_lost)
            return True

        replica.engine.hook = hook

    for replica in stack.decode:
        arm(replica)
    return lost


async def streamed(stack: Stack, path: str, **fields: Any) -> Reply:
    async with stack.streaming(path, **fields) as connection:
        return await connection.reply()


def shown(reply: Reply) -> list[Any]:
    """Every event but for its time; a stream has one id and one time."""
    events = [json.loads(event) for event in reply.events[:-1]]
    assert reply.events[-1] == "[DONE]"
    assert len({(event.pop("id"), event.pop("created")) for event in events}) == 1
    return events


async def unbroken(stack: Stack, path: str, **fields: Any) -> list[Any]:
    """What is shown of a whole stream whose prompt the engines have cached, as they have it for each later one."""
    await streamed(stack, path, **fields)
    return shown(await streamed(stack, path, **fields))


def error_of(reply: Reply) -> dict[str, Any]:
    """The error event before `[DONE]`."""
    assert reply.events[-1] == "[DONE]"
    error: dict[str, Any] = json.loads(reply.events[-2])["error"]
    return error


@PATHS
@SPLICED
@pytest.mark.parametrize("moment", MOMENTS)
async def test_the_stream_goes_on(path: str, spliced: bool, moment: str) -> None:
    """Whenever the replica is lost, the client reads the events of a stream that was not: one of each token."""
    async with running_stack(num_decode=2, spliced=spliced, itl_ms=1) as stack:
        whole = await unbroken(stack, path, **GREEDY)
        lost = armed(stack, MOMENTS[moment])
        assert shown(await streamed(stack, path, **GREEDY)) == whole
        assert len(lost) == 1
        assert stack.metric("disagg_resumes_total", outcome="resumed") == 1
        assert stack.metric("disagg_broken_streams_total") == 0
        await stack.settled()


@PATHS
@TRANSPORTS
async def test_twice(path: str, transport: Any) -> None:
    """A second loss resumes again, from all that both replicas sent; the first one may be used once more."""
    async with running_stack(num_decode=2, itl_ms=1, transport=transport) as stack:
        whole = await unbroken(stack, path, **GREEDY)
        armed(stack, after(4), after(4))
        assert shown(await streamed(stack, path, **GREEDY)) == whole
        assert stack.metric("disagg_resumes_total", outcome="resumed") == 2


@PATHS
async def test_no_more_than_max_attempts(path: str) -> None:
    """A request on which that many replicas were lost ends with an error event."""
    async with running_stack(num_decode=2, itl_ms=1, config=GatewayConfig(max_attempts=2)) as stack:
        armed(stack, after(3), after(3))
        reply = await streamed(stack, path, **GREEDY)
        assert "2 replicas were lost on it" in error_of(reply)["message"]
        assert stack.metric("disagg_resumes_total", outcome="failed") == 1
        assert stack.metric("disagg_broken_streams_total") == 1


@PATHS
async def test_losses_before_the_first_byte_count(path: str) -> None:
    """`max_attempts` is of the whole request: a replica that was lost before the stream began is one of them."""
    async with running_stack(num_decode=4, itl_ms=1, config=GatewayConfig(max_attempts=2)) as stack:
        armed(stack, after(0), after(3))
        reply = await streamed(stack, path, **GREEDY)
        assert "2 replicas were lost on it" in error_of(reply)["message"]
        assert len([replica for replica in stack.decode if replica.engine.seen]) == 2


@PATHS
async def test_losses_while_it_goes_on_count(path: str) -> None:
    """Replicas that fail at taking the stream over are under `max_attempts` too, and none of them is asked twice."""
    config = GatewayConfig(max_attempts=3, resume_wait_s=1)
    async with running_stack(num_decode=5, itl_ms=1, config=config) as stack:

        def break_all(lost: Replica) -> None:
            for replica in stack.decode:
                replica.engine.hook = respond(500)
            lost.cut()

        armed(stack, after(5), how=break_all)
        reply = await streamed(stack, path, **GREEDY)
        assert error_of(reply)["code"] == "replica_lost"
        assert [len(replica.engine.seen) for replica in stack.decode if replica.engine.seen] == [1, 1, 1]


async def test_tries_to_go_on_come_further_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to two seconds apart, each pause shortened by up to a half."""
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    class Nobody:
        async def resume(self, call: Call, losses: Losses) -> Any:
            raise AttemptsExhaustedError("enough") if len(pauses) == 7 else NoReplicaError("nobody")

    body = {"model": "m", "prompt": "x", "stream": True, "temperature": 0}
    call = Call("completions", body, json.dumps(body).encode(), [[1]], "r")
    nobody: Any = Nobody()
    resumer = Resumer(nobody, StubRenderer(), Metrics(), GatewayConfig())
    monkeypatch.setattr(asyncio, "sleep", pause)
    with pytest.raises(AttemptsExhaustedError):
        await resumer.begin(resume_plan(call), Losses())._again(Cut(0, ""))
    longest = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert len(pauses) == 7 and len(set(pauses)) > 1
    assert all(long / 2 < pause <= long for pause, long in zip(pauses, longest, strict=True))


def test_a_replica_breaks_once() -> None:
    """Lost with its stream and answering 5xx until its process ends is one loss; a second stream is another."""
    losses = Losses()
    losses.add_stream("d0")
    for _ in range(3):
        losses.add("d0")
    assert (losses.count, losses.replica_ids) == (1, {"d0"})
    losses.add("d1", had_it=False)
    assert (losses.count, losses.replica_ids) == (1, {"d0", "d1"})
    losses.add("d1")
    losses.add_stream("d0")
    assert losses.count == 3


@PATHS
async def test_continuous_usage_and_token_ids(path: str) -> None:
    """Each chunk counts the whole answer, and a client that asks for token ids gets each of them once."""
    fields = {**GREEDY, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    async with running_stack(num_decode=2, itl_ms=1) as stack:
        for extra in ({}, {"return_token_ids": True}):
            whole = await unbroken(stack, path, **fields, **extra)
            armed(stack, after(5))
            assert shown(await streamed(stack, path, **fields, **extra)) == whole


@PATHS
async def test_sampling_goes_on(path: str) -> None:
    """Without temperature 0 and without a seed the rest is a sample like any other, and no text comes twice."""
    async with running_stack(num_decode=2, itl_ms=1) as stack:
        whole = await unbroken(stack, path, max_tokens=12, temperature=0.8, top_p=0.9)
        armed(stack, after(5))
        assert shown(await streamed(stack, path, max_tokens=12, temperature=0.8, top_p=0.9)) == whole


@PATHS
@pytest.mark.parametrize("num_chunks", range(2, 9))
async def test_inside_a_stop_string(path: str, num_chunks: int) -> None:
    """Wherever it is lost around a stop string of several tokens, the stream ends before it as it would have."""
    async with running_stack(num_decode=2, itl_ms=1) as stack:
        text = (await streamed(stack, path, **GREEDY)).text
        words = text.split(" ")
        stop = " " + " ".join(words[5:8])
        fields = {**GREEDY, "stop": [stop, "never"]}
        whole = await streamed(stack, path, **fields)
        assert whole.text == text[: text.index(stop)]
        armed(stack, after(num_chunks))
        reply = await streamed(stack, path, **fields)
        assert reply.text == whole.text
        last, usage = shown(reply)[-2:]
        assert last["choices"][0]["finish_reason"] == "stop" and last["choices"][0]["stop_reason"] == stop
        assert usage == shown(whole)[-1]


@PATHS
async def test_engine_core_dies_behind_its_http_server(path: str) -> None:
    """vLLM says so in an error event and ends the stream properly; the client sees neither."""
    async with running_stack(num_decode=2, itl_ms=1) as stack:
        whole = await unbroken(stack, path, **GREEDY)

        def die(replica: Replica) -> None:
            replica.engine.fail(RuntimeError("core died"))

        for replica in stack.decode:
            armed_death(replica, die)
        assert shown(await streamed(stack, path, **GREEDY)) == whole
        assert stack.metric("disagg_resumes_total", outcome="resumed") == 1


async def test_only_engine_dies_behind_its_http_server() -> None:
    """While the dying replica answers 500 the stream waits for its successor."""
    async with running_stack(itl_ms=1, config=DECODE_ONLY) as stack:
        whole = await unbroken(stack, CHAT, **GREEDY)
        [replica] = stack.decode
        armed_death(replica, lambda replica: replica.engine.fail(RuntimeError("core died")))
        async with stack.streaming(CHAT, **GREEDY) as connection:
            reply = asyncio.ensure_future(connection.reply())
            await until(lambda: len(replica.engine.seen) >= 3)
            await stack.join("decode", "d-new", itl_ms=1)
            assert shown(await reply) == whole


async def test_refused_by_the_next_replica() -> None:
    """A 4xx to the request that goes on ends the stream at once, in place of asking for a minute."""
    async with running_stack(num_decode=2, itl_ms=1) as stack:

        def shrink(lost: Replica) -> None:
            for replica in stack.decode:
                replica.engine._max_model_len = 10
            lost.cut()

        armed(stack, after(5), how=shrink)
        error = error_of(await streamed(stack, COMPLETIONS, temperature=0, max_tokens=8))
        assert "answered 400" in error["message"]
        assert stack.metric("disagg_resumes_total", outcome="failed") == 1


def armed_death(replica: Replica, die: Callable[[Replica], None], after_chunks: int = 5) -> None:
    """`die` once the replica has sent that many chunks; what it says then still goes out. The first replica only."""

    async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
        if "completions" not in scope["path"]:
            return False
        sent = 0

        async def counting(message: Message) -> None:
            nonlocal sent
            sent += 1
            await send(message)
            if sent == after_chunks and not counting_done:
                counting_done.append(True)
                die(replica)

        await replica.engine.own_app(scope, receive, counting)
        return True

    replica.engine.hook = hook


counting_done: list[bool] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    counting_done.clear()


@PATHS
async def test_waits_for_a_replica(path: str) -> None:
    """With no decode replica left the stream waits for one and goes on there."""
    async with running_stack(itl_ms=1) as stack:
        whole = await unbroken(stack, path, **GREEDY)
        lost = armed(stack, after(5), how=Replica.kill)
        async with stack.streaming(path, **GREEDY) as connection:
            reply = asyncio.ensure_future(connection.reply())
            await until(lambda: lost)
            await stack.join("decode", "d-new", itl_ms=1)
            assert shown(await reply) == whole
        assert stack.metric("disagg_resume_gap_seconds_count") == 1


@PATHS
async def test_hung_replica(path: str) -> None:
    """A replica that stands still is given up from outside; its stream goes on elsewhere all the same."""
    async with running_stack(num_decode=2, itl_ms=1) as stack:
        whole = await unbroken(stack, path, **GREEDY)
        hung = armed(stack, after(5), how=lambda replica: None)
        async with stack.streaming(path, **GREEDY) as connection:
            reply = asyncio.ensure_future(connection.reply())
            await until(lambda: hung)
            stack.client(hung[0]).fail(ReplicaLostError("it hangs", sent=True, gone=False))
            assert shown(await reply) == whole


@PATHS
async def test_nobody_to_go_on(path: str) -> None:
    """After `resume_wait_s` without a decode replica the stream ends with an error event."""
    async with running_stack(itl_ms=1, config=GatewayConfig(resume_wait_s=0.01, prefill_alone_tokens=0)) as stack:
        armed(stack, after(5), how=Replica.kill)
        error = error_of(await streamed(stack, path, **GREEDY))
        assert "no replica is ready" in error["message"] and error["code"] == "replica_lost"
        assert stack.metric("disagg_resumes_total", outcome="failed") == 1


def updated(stack: Stack, how: Callable[[Replica], None]) -> Callable[[Replica], None]:
    """Lose a replica while all others are replaced by ones with another model."""

    def lose(lost: Replica) -> None:
        how(lost)
        for replica in stack.decode:
            replica.kv_fit = lost.kv_fit if replica is lost else "another"
        stack.announce()

    return lose


@PATHS
async def test_another_model_does_not_go_on(path: str) -> None:
    """In the middle of a rolling update a stream goes on only where the model is the one it began with."""
    async with running_stack(num_decode=3, itl_ms=1) as stack:
        whole = await unbroken(stack, path, **GREEDY)
        lost = armed(stack, after(5), how=updated(stack, Replica.cut))
        seen = {replica.replica_id: len(replica.engine.seen) for replica in stack.decode}
        assert shown(await streamed(stack, path, **GREEDY)) == whole
        others = [replica for replica in stack.decode if replica is not lost[0]]
        assert [len(replica.engine.seen) - seen[replica.replica_id] for replica in others] == [0, 0]


@PATHS
@pytest.mark.parametrize("late", [False, True], ids=["seen before", "joins meanwhile"])
async def test_only_another_model_is_left(path: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none of them left the stream says so; nothing of the other model reaches the client."""
    config = GatewayConfig(resume_wait_s=0.3, prefill_alone_tokens=0)
    async with running_stack(num_decode=2, itl_ms=1, config=config) as stack:
        whole = (await streamed(stack, path, **GREEDY)).text
        how = updated(stack, Replica.kill)
        armed(stack, after(5), how=joining_after_the_look(stack, monkeypatch) if late else how)
        reply = await streamed(stack, path, **GREEDY)
        assert "has another model" in error_of(reply)["message"]
        text = Reply(200, {}, b"".join(f"data: {event}\n\n".encode() for event in reply.events[:-2])).text
        assert text and whole.startswith(text) and text != whole


def joining_after_the_look(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Callable[[Replica], None]:
    """Lose a replica, the last one of its model; the others join when the gateway looks for who could go on."""
    sparing = stack.gateway.chooser.sparing

    def lose(lost: Replica) -> None:
        lost.kill()
        others = [replica for replica in stack.decode if replica is not lost]
        stack.gateway.membership.replace("decode", [lost.info])

        def looked(*args: Any) -> Any:
            found = sparing(*args)
            for replica in others:
                replica.kv_fit = "another"
            stack.announce()
            return found

        monkeypatch.setattr(stack.gateway.chooser, "sparing", looked)

    return lose


@PATHS
async def test_other_text_is_never_sent(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that continues a greedy answer differently ends the stream; its text does not reach the client."""
    async with running_stack(num_decode=2, itl_ms=1) as stack:
        fields = {**GREEDY, "stop": ["never"]}
        whole = (await streamed(stack, path, **fields)).text
        for replica in stack.decode:
            monkeypatch.setattr(replica.engine, "_answers", other_when_resumed(replica))
        armed(stack, after(6))
        reply = await streamed(stack, path, **fields)
        assert "gave other text" in error_of(reply)["message"]
        tokens = [json.loads(event) for event in reply.events[:-2]]
        texts = [c.get("text") or (c.get("delta") or {}).get("content") or "" for e in tokens for c in e["choices"]]
        assert texts and whole.startswith("".join(texts))
        assert stack.metric("disagg_resume_diverged_total") == 1


def other_when_resumed(replica: Replica) -> Callable[[Any], Any]:
    own, seen = replica.engine._answers, replica.engine.seen

    def answers(generation: Any) -> Any:
        resumed = any(token >= 256 for token in generation.prompts[0])
        if resumed:
            [answer] = own(generation)
            texts = [text.replace("w", "v") for text in answer.texts]
            return [type(answer)(answer.tokens, texts, answer.finish_reason, answer.stop_reason)]
        assert seen
        return own(generation)

    return answers


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "seed": ("field:seed", {"seed": 1}),
    "presence_penalty": ("field:presence_penalty", {"presence_penalty": 0.5}),
    "frequency_penalty": ("field:frequency_penalty", {"frequency_penalty": 0.5}),
    "n": ("field:n", {"n": 2}),
    "response_format": ("field:response_format", {"response_format": {"type": "json_object"}}),
    "structured_outputs": ("field:structured_outputs", {"structured_outputs": {"choice": ["a"]}}),
    "bad_words": ("field:bad_words", {"bad_words": ["w"]}),
    "vllm_xargs": ("field:vllm_xargs", {"vllm_xargs": {"a": 1}}),
    "unknown field": ("field:something_new", {"something_new": 1}),
    "sampling and stop strings": ("field:stop", {"temperature": 0.5, "stop": "never"}),
}


@PATHS
@pytest.mark.parametrize("kind", REFUSED)
async def test_refused(path: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be continued honestly ends with an error event that says why, and its engine was asked no more.

    Where the engine was is in the log, beside the request's id, and nowhere else.
    """
    reason, fields = REFUSED[kind]
    async with running_stack(num_decode=2, itl_ms=1) as stack:
        armed(stack, after(5))
        reply = await streamed(stack, path, **{"temperature": 0, "max_tokens": 12, **fields})
        error = error_of(reply)
        assert f"it cannot be resumed ({reason})" in error["message"] and error["code"] == "replica_lost"
        assert "127.0.0.1" not in reply.body.decode()
        [logged] = [r.getMessage() for r in caplog.records if "is cut" in r.getMessage()]
        assert "127.0.0.1" in logged and reply.headers["x-request-id"] in logged
        assert stack.metric("disagg_resumes_total", outcome="refused") == 1
        assert sum(len(replica.engine.seen) for replica in stack.decode) == 1
        [seen] = [seen for replica in stack.decode for seen in replica.engine.seen]
        assert "return_token_ids" not in seen.body


@PATHS
@SPLICED
async def test_the_client_sees_no_difference(path: str, spliced: bool) -> None:
    """The bytes of a stream are those that vLLM writes to who did not ask for token ids."""
    async with running_stack(spliced=spliced) as stack:
        await streamed(stack, path, temperature=0)
        asked = await streamed(stack, path, temperature=0)
        not_asked = await streamed(stack, path, temperature=0, seed=1)
        first, second = stack.decode[0].engine.seen[-2:]
        assert first.body["return_token_ids"] is True and "return_token_ids" not in second.body
        assert shown(asked) == shown(not_asked)
        for event, other in zip(asked.events, not_asked.events, strict=True):
            assert _without_head(event) == _without_head(other)


def _without_head(event: str) -> str:
    """Without its time, and without what caches had."""
    return re.sub(r',"prompt_tokens_details":{[^}]*}', "", event[event.find('"choices"') :])


async def test_client_leaves_while_it_waits() -> None:
    """A client that goes while its stream waits for a replica takes everything with it."""
    async with running_stack(itl_ms=1) as stack:
        lost = armed(stack, after(5), how=Replica.kill)
        async with stack.streaming(CHAT, **GREEDY) as connection:
            assert (await connection.head())[0] == 200
            await until(lambda: lost)
            connection.leave()
            await until(lambda: stack.gateway.in_flight.num == 0)
        assert stack.metric("disagg_client_disconnects_total", phase="stream") == 1


async def test_half_an_event_is_not_sent() -> None:
    """A replica lost in the middle of an event leaves nothing of it at the client."""
    async with running_stack(num_decode=2, itl_ms=1) as stack:
        whole = await unbroken(stack, COMPLETIONS, **GREEDY)
        halved(stack)
        assert shown(await streamed(stack, COMPLETIONS, **GREEDY)) == whole


def halved(stack: Stack) -> None:
    """The first stream's replica sends half of its fifth chunk and is lost."""
    done: list[bool] = []

    def arm(replica: Replica) -> None:
        async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
            if "completions" not in scope["path"] or done:
                return False
            sent = 0

            async def half(message: Message) -> None:
                nonlocal sent
                sent += message["type"] == "http.response.body"
                if sent < 5:
                    await send(message)
                elif sent == 5:
                    done.append(True)
                    body = message["body"]
                    await send({**message, "body": body[: len(body) // 2]})
                    replica.cut()

            await replica.engine.own_app(scope, receive, half)
            return True

        replica.engine.hook = hook

    for replica in stack.decode:
        arm(replica)


def rewritten(replica: Replica, change: Callable[[bytes], list[bytes]]) -> None:
    """Each body message of the engine becomes the messages that `change` makes of it."""

    async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
        if "completions" not in scope["path"]:
            return False

        async def changed(message: Message) -> None:
            if message["type"] != "http.response.body":
                await send(message)
                return
            *parts, last = change(message.get("body", b""))
            for part in parts:
                await send({**message, "body": part, "more_body": True})
            await send({**message, "body": last})

        await replica.engine.own_app(scope, receive, changed)
        return True

    replica.engine.hook = hook


SEEDED = {"seed": 1, **USAGE}
"""Of a stream that cannot be resumed."""


@PATHS
@SPLICED
async def test_an_end_without_done(path: str, spliced: bool) -> None:
    """A stream that just ends is a lost one, also where nobody can take it on: the client is told."""
    async with running_stack(spliced=spliced) as stack:
        whole = await streamed(stack, path, **SEEDED)
        rewritten(stack.decode[0], lambda body: [body.replace(b"data: [DONE]\n\n", b"")])
        reply = await streamed(stack, path, **SEEDED)
        assert "cannot be resumed (field:seed)" in error_of(reply)["message"]
        assert len(reply.events) == len(whole.events) + 1
        assert stack.metric("disagg_broken_streams_total") == 1


@PATHS
@SPLICED
async def test_done_in_pieces(path: str, spliced: bool) -> None:
    """However `[DONE]` is cut on its way, it is one."""
    async with running_stack(spliced=spliced) as stack:
        whole = await streamed(stack, path, **SEEDED)
        done = b"data: [DONE]\n\n"
        for cut in range(1, len(done)):
            rewritten(
                stack.decode[0],
                lambda body, cut=cut: [done[:cut], done[cut:]] if body == done else [body],  # type: ignore[misc]
            )
            reply = await streamed(stack, path, **SEEDED)
            assert [_without_head(event) for event in reply.events] == [_without_head(event) for event in whole.events]
        assert stack.metric("disagg_broken_streams_total") == 0


@PATHS
@SPLICED
@pytest.mark.parametrize("kind", ["error", "abort"])
async def test_cut_by_its_engine(path: str, spliced: bool, kind: str) -> None:
    """Where nobody can take a stream on, what the engine says at its end goes on as it is, and is counted."""
    events = {
        "error": b'data: {"error": {"message": "EngineCore is dead", "type": "InternalServerError", "code": 500}}\n\n',
        "abort": b'data: {"choices":[{"index":0,"finish_reason":"abort"}]}\n\n',
    }
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n' if kind == "abort" else b""
    async with running_stack(spliced=spliced) as stack:

        def ended(body: bytes) -> list[bytes]:
            return [events[kind], usage, body] if b"[DONE]" in body else [body]

        rewritten(stack.decode[0], ended)
        reply = await streamed(stack, path, seed=1)
        assert reply.events[-1] == "[DONE]" and events[kind] in reply.body and reply.body.count(b'"error"') <= 1
        assert stack.metric("disagg_broken_streams_total") == 1
        assert stack.metric("disagg_resumes_total", outcome="refused") == 1
