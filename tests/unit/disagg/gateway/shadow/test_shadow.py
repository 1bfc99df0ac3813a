# SPDX-License-Identifier: Apache-2.0
"""The corruption watch: answers made of moved KV are computed again without it, and pairs whose KV is wrong go."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from disagg.config import GatewayConfig
from disagg.gateway.handoff.token_ids import without_ids
from disagg.gateway.replicas import kv_paths
from disagg.gateway.replicas.kv_paths import KvPaths
from disagg.gateway.replicas.membership import Pair
from disagg.gateway.shadow.rules import Computed, computed, difference, may_check, shadow_body
from pools.engine.base import ProbeResult, Receive, Scope, Send
from pools.engine.fake import openai_shapes as fake_wire
from pools.engine.fake.text import answer, next_token, word
from tests.support.gateway_stack import MODEL, Replica, Reply, Seen, Stack, respond, run, running_stack, until
from transport.handoff_params import DO_REMOTE_PREFILL

GREEDY: dict[str, Any] = {"temperature": 0}
WATCHING = GatewayConfig(shadow_check_every=1)
KEY = ("prefill", "decode")
CHECKS = "disagg_shadow_checks_total"


def config(**fields: Any) -> GatewayConfig:
    return GatewayConfig(**{"shadow_check_every": 1} | fields)


def corrupt(replica: Replica, *, at: int = 2) -> Callable[[], None]:
    """Make every token from `at` on another one where the prompt's KV came from elsewhere; returns what mends it."""
    engine = replica.engine
    right = engine._answers

    def answers(generation: fake_wire.Generation) -> list[fake_wire.Answer]:
        found = right(generation)
        if not (generation.kv_transfer_params or {}).get(DO_REMOTE_PREFILL):
            return found
        return [_other(right_answer, at) for right_answer in found]

    engine._answers = answers  # type: ignore[method-assign]
    return lambda: setattr(engine, "_answers", right)


def _other(found: fake_wire.Answer, at: int) -> fake_wire.Answer:
    tokens = [t if i < at else next_token(t + i) for i, t in enumerate(found.tokens)]
    return dataclasses.replace(found, tokens=tokens, texts=[word(t) for t in tokens])


def shadows(replica: Replica) -> list[Seen]:
    return [seen for seen in replica.engine.seen if seen.headers.get("x-request-id", "").startswith("shadow-")]


def checks(stack: Stack, outcome: str) -> float:
    return stack.metric(CHECKS, outcome=outcome)


async def checked(stack: Stack, num_checks: int) -> None:
    """Wait until so many second runs were compared."""
    await until(lambda: checks(stack, "same") + checks(stack, "different") == num_checks)


async def streamed(stack: Stack, path: str = "/v1/completions", **fields: Any) -> Reply:
    async with stack.streaming(path, **fields) as connection:
        return await connection.reply()


_numbers = itertools.count()


async def ask(stack: Stack, kind: str, text: str | None = None, **fields: Any) -> Reply:
    """One greedy request, by default with a prompt that no engine has seen."""
    text = text or f"{next(_numbers)} is a prompt longer than one block of KV"
    if kind == "completion":
        return await stack.complete(text, **GREEDY, **fields)
    if kind == "chat":
        return await stack.chat(text, **GREEDY, **fields)
    if kind == "streamed completion":
        return await streamed(stack, prompt=text, **GREEDY, **fields)
    messages = [{"role": "user", "content": text}]
    return await streamed(stack, "/v1/chat/completions", messages=messages, **GREEDY, **fields)


KINDS = ("completion", "chat", "streamed completion", "streamed chat")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", ["nixl", "mooncake"])
def test_a_right_answer_is_the_same_when_it_is_computed_again(kind: str, transport: Any) -> None:
    """Both transports, both endpoints, streamed or not: the second run goes to the same replica, without KV."""

    async def test() -> None:
        async with running_stack(num_decode=2, config=WATCHING, transport=transport) as stack:
            reply = await ask(stack, kind)
            await until(lambda: checks(stack, "same"))
            replica = next(r for r in stack.decode if r.replica_id == reply.headers["x-disagg-decode"])
            (second,) = shadows(replica)
            assert second.body["max_tokens"] == 8
            assert DO_REMOTE_PREFILL not in second.body["kv_transfer_params"]
            assert stack.metric("disagg_local_prefills_total", reason="short") == 0
            await stack.settled()

    run(test())


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_answer_is_found(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A corrupted hand-off is counted and logged with its pair, the request and the place."""

    async def test() -> None:
        async with running_stack(config=WATCHING) as stack:
            corrupt(stack.decode[0], at=3)
            reply = await ask(stack, kind)
            await until(lambda: checks(stack, "different"))
            assert reply.status == 200
            (record,) = (r for r in caplog.records if r.name == "disagg.gateway.shadow.shadow")
            message = record.getMessage()
            assert message.startswith("token 3 of the answer to request ")
            assert "from p0 on d0" in message and "hand-off " in message

    run(test())


def test_two_wrong_answers_in_a_row_take_the_pair_out() -> None:
    """One of two pairs is wrong: it goes cold at the second answer, and the other one carries all that follows."""

    async def test() -> None:
        async with running_stack(num_decode=2, config=WATCHING) as stack:
            corrupt(stack.decode[0])
            num_asked = 0
            while checks(stack, "different") < 2:
                await ask(stack, "completion")
                num_asked += 1
                await checked(stack, num_asked)
            assert not stack.gateway.membership.members("prefill")[0].warm_peers - {"d1"}
            assert not stack.gateway.membership.cold_pairs(), "it is left alone, or it would be warm again at once"
            for _ in range(3):
                assert (await ask(stack, "completion")).headers["x-disagg-decode"] == "d1"
            metric = stack.gateway.metrics.render().decode()
            assert 'disagg_kv_path_verified{decode="d0",prefill="p0"} 0.0' in metric
            assert 'disagg_kv_path_verified{decode="d1",prefill="p0"} 1.0' in metric

    run(test())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [False, True])
def test_a_client_sees_nothing_of_it(kind: str, asked: bool) -> None:
    """The answer is, but for its id and time, that of a gateway that checks nothing, token ids or none."""

    def plain(reply: Reply) -> list[Any]:
        bodies = [json.loads(e) for e in reply.events if e != "[DONE]"]
        return [{**body, "id": None, "created": None} for body in bodies]

    async def test() -> None:
        replies = []
        for settings in (WATCHING, GatewayConfig()):
            async with running_stack(config=settings) as stack:
                replies.append(await ask(stack, kind, "a prompt longer than one block of KV", return_token_ids=asked))
                await stack.settled()
        assert plain(replies[0]) == plain(replies[1])
        assert len(replies[0].body) == len(replies[1].body)

    run(test())


def test_one_of_n_is_checked() -> None:
    """With 3, the third and the sixth of seven hand-offs; what is not greedy does not count."""

    async def test() -> None:
        async with running_stack(config=config(shadow_check_every=3)) as stack:
            for i in range(1, 8):
                await ask(stack, "completion")
                await stack.complete("sampled", temperature=0.7)
                await checked(stack, i // 3)
            assert len(shadows(stack.decode[0])) == 2

    run(test())


def test_a_pair_found_wrong_once_is_checked_again_at_once() -> None:
    """Only every 1000th is due; one wrong answer makes the pair's next one due as well."""

    async def test() -> None:
        async with running_stack(config=config(shadow_check_every=1000)) as stack:
            corrupt(stack.decode[0])
            pair = next(iter(stack.gateway.membership.members("prefill")))
            decode = stack.gateway.membership.members("decode")[0]
            stack.gateway.kv_paths.different((pair.info.incarnation, decode.info.incarnation))
            await ask(stack, "completion")
            await until(lambda: checks(stack, "different"))
            await until(lambda: not pair.warm_peers)

    run(test())


def test_a_long_answer_is_compared_up_to_the_limit() -> None:
    """`shadow_max_tokens` bounds the second run; what differs behind it is not seen."""

    async def test() -> None:
        async with running_stack(config=config(shadow_max_tokens=4)) as stack:
            corrupt(stack.decode[0], at=4)
            await ask(stack, "streamed completion", max_tokens=32)
            await until(lambda: checks(stack, "same"))
            (second,) = shadows(stack.decode[0])
            assert second.body["max_tokens"] == 4

    run(test())


def test_one_at_a_time() -> None:
    """While a second run is under way, further ones are skipped and counted."""

    async def test() -> None:
        async with running_stack(config=WATCHING) as stack:
            held, go = asyncio.Event(), asyncio.Event()

            async def hold(scope: Scope, receive: Receive, send: Send) -> bool:
                if (b"x-request-id", b"shadow-") in [(n, v[:7]) for n, v in scope["headers"]]:
                    held.set()
                    await go.wait()
                return False

            stack.decode[0].engine.hook = hold
            await ask(stack, "completion")
            await held.wait()
            await ask(stack, "completion")
            await until(lambda: checks(stack, "skipped") == 1)
            go.set()
            await until(lambda: checks(stack, "same") == 1)

    run(test())


def test_a_busy_gateway_checks_nothing() -> None:
    """With a quarter of what it may carry under way, checks are skipped."""

    async def test() -> None:
        async with running_stack(config=config(max_num_requests=3)) as stack:
            await ask(stack, "completion")
            await until(lambda: checks(stack, "skipped") == 1)
            assert not shadows(stack.decode[0])

    run(test())


def test_a_replica_without_room_is_not_asked() -> None:
    """A check is one more prompt for decode to compute and keeps to its budget."""

    async def test() -> None:
        async with running_stack(config=config(local_prefill_tokens=10)) as stack:
            stack.gateway.membership.members("decode")[0].local_prefill_tokens = 5
            await ask(stack, "completion")
            await until(lambda: checks(stack, "skipped") == 1)
            assert not shadows(stack.decode[0])

    run(test())


def test_kv_that_was_not_read_proves_nothing() -> None:
    """A decode engine that computed the prompt after all: no second run."""

    async def test() -> None:
        async with running_stack(config=WATCHING) as stack:

            async def nothing(params: Any, prompt: Any, num_local: int, running: Any) -> int:
                return num_local

            stack.decode[0].engine._fetch = nothing  # type: ignore[method-assign]
            await ask(stack, "completion")
            await until(lambda: checks(stack, "skipped") == 1)
            assert not shadows(stack.decode[0])

    run(test())


def test_a_second_run_that_fails_says_nothing_of_the_pair(caplog: pytest.LogCaptureFixture) -> None:
    """It is counted as failed, and the pair goes on."""

    async def test() -> None:
        async with running_stack(config=WATCHING) as stack:

            async def refuse(scope: Scope, receive: Receive, send: Send) -> bool:
                if (b"x-request-id", b"shadow-") not in [(n, v[:7]) for n, v in scope["headers"]]:
                    return False
                head = [(b"content-type", b"application/json"), (b"content-length", b"2")]
                await send({"type": "http.response.start", "status": 500, "headers": head})
                await send({"type": "http.response.body", "body": b"{}"})
                return True

            stack.decode[0].engine.hook = refuse
            await ask(stack, "completion")
            await until(lambda: checks(stack, "failed") == 1)
            assert stack.gateway.membership.num_warm_pairs() == 1
            assert "could not be checked" in caplog.text

    run(test())


def test_a_near_tie_says_nothing_of_the_pair() -> None:
    """Two tokens nearly as likely: counted as a tie, and neither the pair nor its gauge changes."""

    async def test() -> None:
        async with running_stack(config=WATCHING) as stack:
            engine = stack.decode[0].engine

            async def near(scope: Scope, receive: Receive, send: Send) -> bool:
                if not dict(scope["headers"])[b"x-request-id"].startswith(b"shadow-"):
                    return False
                token = answer(engine.seen[-1].body["prompt"], 1)[0]
                top = {f"token_id:{token + 1}": -0.7, f"token_id:{token}": -0.8}
                choice = {"token_ids": [token + 1], "logprobs": {"top_logprobs": [top]}, "finish_reason": "length"}
                return await respond(200, json.dumps({"choices": [choice]}).encode())(scope, receive, send)

            pair = _pair(stack)
            engine.hook = near
            for num_ties in (1, 2, 3):
                await ask(stack, "completion")
                await until(lambda: checks(stack, "tie") == num_ties)  # noqa: B023
            assert stack.gateway.membership.num_warm_pairs() == 1
            assert stack.gateway.kv_paths.verified(pair.key) is True

    run(test())


def test_a_client_that_leaves_is_not_checked() -> None:
    """An answer that was not sent in full has nothing to compare."""

    async def test() -> None:
        async with running_stack(config=WATCHING, itl_ms=20) as stack:
            async with stack.streaming(**GREEDY, max_tokens=64) as connection:
                await connection.head()
                connection.leave()
            await stack.settled()
            await until(lambda: stack.gateway.in_flight.num == 0)
            assert not shadows(stack.decode[0])
            assert not any(checks(stack, o) for o in ("same", "different", "skipped", "failed"))

    run(test())


def test_off_by_default() -> None:
    """Nothing runs twice, and no answer is asked for its token ids."""

    async def test() -> None:
        async with running_stack() as stack:
            assert stack.gateway.api.answering.shadow is None
            await ask(stack, "completion")
            assert "return_token_ids" not in stack.decode[0].engine.seen[-1].body

    run(test())


def test_the_gauge_follows_the_pairs() -> None:
    """A warm pair is 1; a pair that is gone has no series."""

    async def test() -> None:
        async with running_stack(num_decode=2) as stack:
            page = stack.gateway.metrics.render().decode()
            assert 'disagg_kv_path_verified{decode="d0",prefill="p0"} 1.0' in page
            assert 'disagg_kv_path_verified{decode="d1",prefill="p0"} 1.0' in page
            gone = stack.decode.pop()
            stack.announce()
            page = stack.gateway.metrics.render().decode()
            assert "d1" not in [line for line in page.splitlines() if "kv_path_verified" in line][-1]
            await gone.stop()

    run(test())


def test_a_pair_that_cannot_move_kv_is_not_verified() -> None:
    """A warm-up that brings nothing sets 0, the first that does sets 1."""

    async def test() -> None:
        async with running_stack() as stack:
            engine = stack.decode[0].engine
            right = engine.probe

            async def nothing(*args: Any, **kwargs: Any) -> ProbeResult:
                return dataclasses.replace(await right(*args, **kwargs), num_cached_tokens=0)

            engine.probe = nothing  # type: ignore[method-assign]
            pair = _pair(stack)
            stack.gateway.membership.mark_cold(pair)
            await until(lambda: stack.gateway.kv_paths.verified(pair.key) is False)
            engine.probe = right  # type: ignore[method-assign]
            await stack.warmed()
            assert stack.gateway.kv_paths.verified(pair.key) is True

    run(test())


def test_a_pair_comes_back_after_its_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is warmed again, is not taken for right by that, and is checked with its first answer."""
    monkeypatch.setattr(kv_paths, "_FIRST_REST_S", 0.05)

    async def test() -> None:
        async with running_stack(config=config(shadow_check_every=1000)) as stack:
            pair = _pair(stack)
            stack.gateway.kv_paths.different(pair.key)
            mend = corrupt(stack.decode[0])
            await ask(stack, "completion")
            await until(lambda: checks(stack, "different"))
            await until(lambda: not pair.prefill.warm_peers)
            mend()
            await until(lambda: pair.prefill.warm_peers)
            assert stack.gateway.kv_paths.verified(pair.key) is False
            await ask(stack, "streamed chat")
            await until(lambda: checks(stack, "same"))
            assert stack.gateway.kv_paths.verified(pair.key) is True

    run(test())


def _pair(stack: Stack) -> Pair:
    members = stack.gateway.membership.members
    return Pair(members("prefill")[0], members("decode")[0])


class TestKvPaths:
    def test_the_second_different_answer_in_a_row_takes_a_pair_out_for_longer_each_time(self) -> None:
        """60 s, then 120 s; a same answer between starts anew."""
        paths = KvPaths()
        assert [paths.different(KEY) for _ in range(4)] == [None, 60.0, None, 120.0]
        paths.same(KEY)
        assert [paths.different(KEY), paths.different(KEY)] == [None, 60.0]

    def test_a_same_answer_between_two_different_ones_keeps_the_pair(self) -> None:
        """In a row is in a row."""
        paths = KvPaths()
        assert paths.different(KEY) is None
        paths.same(KEY)
        assert paths.different(KEY) is None

    def test_a_warm_up_does_not_clear_a_pair_that_was_wrong(self) -> None:
        """It proves that KV moves, not what it says."""
        paths = KvPaths()
        paths.warmed(KEY)
        assert paths.verified(KEY) is True
        paths.different(KEY)
        paths.warmed(KEY)
        assert paths.verified(KEY) is False and paths.is_suspect(KEY) and paths.any_suspect
        paths.same(KEY)
        assert paths.verified(KEY) is True and not paths.any_suspect

    def test_what_is_known_ends_with_the_incarnation(self) -> None:
        """A pair that is not retained is as new."""
        paths = KvPaths()
        paths.different(KEY)
        paths.retain([*KEY, "another"])
        assert paths.verified(KEY) is False and paths.any_suspect
        paths.retain([KEY[0], "another"])
        assert paths.verified(KEY) is None and not paths.any_suspect


PROMPTS = [[1, 2, 3]]
REFUSED: dict[str, Any] = {
    "temperature": 0.2,
    "n": 2,
    "best_of": 2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"1": 5},
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "min_tokens": 4,
    "tools": [{"type": "function"}],
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "use_beam_search": True,
    "prompt_logprobs": 1,
    "echo": True,
    "suffix": "x",
    "vllm_xargs": {"a": 1},
    "truncate_prompt_tokens": 5,
    "stream": "yes",
    "a_field_of_tomorrow": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_change_tokens_rule_a_check_out(name: str) -> None:
    """Only what is known to leave the best token alone is checked."""
    assert not may_check({"model": MODEL, "prompt": "x", **GREEDY, name: REFUSED[name]}, PROMPTS)


def test_what_may_be_checked() -> None:
    """Greedy by the request's own word, one prompt that was tokenised."""
    plain = {"model": MODEL, "prompt": "x", "max_tokens": 4, "stop": ["a"], "seed": 3, "logprobs": 2, "n": 1}
    assert may_check({**plain, "temperature": 0.0, "presence_penalty": 0, "logit_bias": None}, PROMPTS)
    assert not may_check(plain, PROMPTS)
    assert not may_check({**plain, **GREEDY}, None)
    assert not may_check({**plain, **GREEDY}, [[1], [2]])


def test_answers_part_at_the_first_place() -> None:
    """What follows a difference follows from it; a second answer that is longer is the same."""
    assert difference([5, 6], Computed([5, 6, 7])) is None
    found = difference([5, 6, 7], Computed([5, 9, 8]))
    assert found is not None and (found.position, found.answered, found.computed) == (1, 6, 9)
    short = difference([5, 6], Computed([5]))
    assert short is not None and short.position == 1


@pytest.mark.parametrize(("other", "is_tie"), [(-0.9, True), (-1.3, False), (None, False)])
def test_a_near_tie_is_told_from_a_difference(other: float | None, is_tie: bool) -> None:
    """Less than half a nat behind the best, as the second run's own log-probabilities say."""
    top = {"token_id:9": -0.7} | ({} if other is None else {"token_id:6": other})
    found = difference([6], Computed([9], [top]))
    assert found is not None and found.is_tie is is_tie


def test_an_engine_that_tells_no_logprobs_has_no_ties() -> None:
    """Without them a difference is a difference."""
    found = difference([6], Computed([9]))
    assert found is not None and not found.is_tie


def test_a_second_answer_as_vllm_writes_it() -> None:
    """Token ids and the best tokens of each place; nothing of an answer that was broken off."""
    choice: dict[str, Any] = {
        "index": 0,
        "text": " a",
        "token_ids": [7],
        "finish_reason": "length",
        "logprobs": {"text_offset": [0], "tokens": ["token_id:7"], "top_logprobs": [{"token_id:7": -0.1}]},
    }
    again = computed(json.dumps({"id": "x", "choices": [choice]}).encode())
    assert again == Computed([7], [{"token_id:7": -0.1}])
    assert computed(json.dumps({"choices": [{**choice, "finish_reason": "abort"}]}).encode()) is None
    assert computed(b"no json") is None


def test_a_text_that_looks_like_token_ids_stays() -> None:
    """Inside a JSON string quotes are escaped, so the key is found and the text is not."""
    text = ',"token_ids":[1,2]'
    body = {"choices": [{"text": text, "prompt_token_ids": [9], "token_ids": [3, 4]}]}
    document = json.dumps(body, separators=(",", ":")).encode()
    assert json.loads(without_ids(document)) == {
        "choices": [{"text": text, "prompt_token_ids": None, "token_ids": None}]
    }


def test_penalties_of_the_request_are_those_of_the_second_run() -> None:
    """Unset they would be the model's defaults, which the client has set aside."""
    asked = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": None, "user": "x"}
    body = json.loads(shadow_body(MODEL, [1, 2], 3, asked=asked, cache_salt="s"))
    assert (body["repetition_penalty"], body["presence_penalty"]) == (1, 0)
    assert "frequency_penalty" not in body and "user" not in body
    assert not {name for name in json.loads(shadow_body(MODEL, [1], 3, asked={}, cache_salt="s")) if "penalty" in name}
