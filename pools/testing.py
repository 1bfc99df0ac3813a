# SPDX-License-Identifier: Apache-2.0
"""The contract of an engine as checks over HTTP: what any prefill and decode engine must do, real or fake.

`check_engine` runs them all; a test may also parametrize over `CHECKS`. The engines must be otherwise idle,
because some checks read their counters.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pools.testing_client import OpenReply, Reply, open_request, request

_NUM_TOKENS = 8
_SETTLE_S = 10.0
"""How long counters and gauges may lag behind answers."""
_LONG = 1_000
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


async def check_engine(url_prefill: str, url_decode: str, model: str, prompts: Sequence[str]) -> None:
    """Run every check in order. Raises an ExceptionGroup of what failed, each with the check's name."""
    engines = Engines(url_prefill, url_decode, model, prompts)
    failures: list[Exception] = []
    for check in CHECKS:
        try:
            await check(engines)
        except Exception as exc:
            exc.add_note(f"check: {getattr(check, '__name__', check)}")
            failures.append(exc)
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(CHECKS)} engine checks failed", failures)


async def lists_its_model(engines: Engines) -> None:
    """`/v1/models` names the model and its context length."""
    for url in (engines.prefill, engines.decode):
        cards = {card["id"]: card for card in (await _get(url, "/v1/models"))["data"]}
        _expect(engines.model in cards, f"{engines.model!r} is not in {sorted(cards)}")
        _expect(cards[engines.model]["max_model_len"] > 0, "max_model_len is missing")


async def reports_health_and_metrics(engines: Engines) -> None:
    """`/health` answers 200 and `/metrics` carries vLLM's load gauges."""
    for url in (engines.prefill, engines.decode):
        _expect((await request("GET", f"{url}/health")).status == 200, "/health is not 200")
        text = (await request("GET", f"{url}/metrics")).body.decode()
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
            _expect(f"\n{name}" in text, f"{name} is missing")


async def tokenizes_and_back(engines: Engines) -> None:
    """`/tokenize` and `/detokenize` are inverse on plain text."""
    ids = await _tokens(engines, engines.prompts[0])
    text = (await _post(engines.decode, "/detokenize", {"model": engines.model, "tokens": ids}))["prompt"]
    _expect(engines.prompts[0] in text, f"{engines.prompts[0]!r} became {text!r}")


async def refuses_an_unknown_model(engines: Engines) -> None:
    """A model that is not served is a 404 in the OpenAI error shape."""
    body = _completion(engines, await _tokens(engines, engines.prompts[0])) | {"model": "no-such-model"}
    _expect_error(await request("POST", f"{engines.decode}/v1/completions", body), 404)


async def refuses_a_prompt_beyond_the_context(engines: Engines) -> None:
    """A prompt longer than the context is a 400 in the OpenAI error shape."""
    card = (await _get(engines.decode, "/v1/models"))["data"][0]
    ids = await _tokens(engines, engines.prompts[0])
    too_long = (ids * (card["max_model_len"] // len(ids) + 1))[: card["max_model_len"] + 1]
    _expect_error(await request("POST", f"{engines.decode}/v1/completions", _completion(engines, too_long)), 400)


async def refuses_malformed_requests(engines: Engines) -> None:
    """Broken JSON and missing fields are a 400 in the OpenAI error shape."""
    _expect_error(await request("POST", f"{engines.decode}/v1/completions", b'{"model":'), 400)
    _expect_error(await request("POST", f"{engines.decode}/v1/chat/completions", {"model": engines.model}), 400)


async def counts_usage(engines: Engines) -> None:
    """`usage` counts the prompt's and the answer's tokens, and `max_tokens` ends it with `length`."""
    ids = await _tokens(engines, engines.prompts[0])
    answer = await _answer(engines, _completion(engines, ids))
    usage = answer["usage"]
    _expect(usage["prompt_tokens"] == len(ids), f"prompt_tokens {usage['prompt_tokens']}, sent {len(ids)}")
    _expect(usage["completion_tokens"] == _NUM_TOKENS, f"completion_tokens {usage['completion_tokens']}")
    _expect(usage["total_tokens"] == len(ids) + _NUM_TOKENS, f"total_tokens {usage['total_tokens']}")
    _expect(answer["choices"][0]["finish_reason"] == "length", "finish_reason is not length")


async def streams_one_event_a_write(engines: Engines) -> None:
    """A stream is one SSE event a write, has the tokens of the plain answer, then usage, then `[DONE]`."""
    body = _completion(engines, await _tokens(engines, engines.prompts[0]))
    plain = await _answer(engines, body)
    events = await _events(engines, "/v1/completions", body | _STREAM)
    usage = events.pop()
    _expect(usage["choices"] == [] and usage["usage"] == _counts(plain["usage"]), f"usage event {usage}")
    _expect(_streamed_ids(events) == plain["choices"][0]["token_ids"], "stream and document differ")
    _expect("".join(event["choices"][0]["text"] for event in events) == plain["choices"][0]["text"], "texts differ")
    _expect([event["choices"][0]["finish_reason"] for event in events][-1] == "length", "no finish_reason")


async def streams_a_chat(engines: Engines) -> None:
    """A chat stream opens with the role, then has content, a finish reason, usage and `[DONE]`."""
    body = _chat(engines)
    plain = await _answer(engines, body, "/v1/chat/completions")
    first, *events, usage = await _events(engines, "/v1/chat/completions", body | _STREAM)
    _expect(first["choices"][0]["delta"] == {"role": "assistant", "content": ""}, f"first event {first}")
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    _expect(text == plain["choices"][0]["message"]["content"], "stream and document differ")
    _expect(events[-1]["choices"][0]["finish_reason"] == "length", "no finish_reason")
    _expect(usage["choices"] == [] and usage["usage"]["completion_tokens"] == _NUM_TOKENS, f"usage event {usage}")


async def stops_at_a_stop_string(engines: Engines) -> None:
    """A stop string ends the answer before it, with `finish_reason` stop and the string as `stop_reason`."""
    body = _completion(engines, await _tokens(engines, engines.prompts[0]))
    text = (await _answer(engines, body))["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    if not stop.strip() or not text.isascii():
        return
    choice = (await _answer(engines, body | {"stop": [stop]}))["choices"][0]
    _expect(choice["text"] == text[: text.index(stop)], f"{choice['text']!r} from {text!r} with stop {stop!r}")
    _expect((choice["finish_reason"], choice["stop_reason"]) == ("stop", stop), f"ended with {choice}")


async def answers_n_choices(engines: Engines) -> None:
    """`n` gives that many choices, numbered from 0."""
    ids = await _tokens(engines, engines.prompts[0])
    answer = await _answer(engines, _completion(engines, ids) | {"n": 2, "temperature": 1.0})
    _expect([choice["index"] for choice in answer["choices"]] == [0, 1], "not two choices")
    _expect(answer["usage"]["completion_tokens"] == 2 * _NUM_TOKENS, "usage does not count every choice")


async def prefill_leg_names_the_handoff(engines: Engines) -> None:
    """A prefill leg answers one token and parameters that name engine, request, blocks and address."""
    ids = await _tokens(engines, engines.prompts[0])
    async with _handoff(engines, ids) as params:
        stats = await _stats(engines.prefill)
        _expect(params["remote_engine_id"] == stats["engine_id"], f"{params['remote_engine_id']} is another engine")
        _expect(bool(params["remote_request_id"]) and bool(params["remote_block_ids"]), f"incomplete: {params}")
        _expect(isinstance(params["remote_host"], str) and params["remote_port"] > 0, f"no address: {params}")


async def same_tokens_with_and_without_handoff(engines: Engines) -> None:
    """A decode leg gives the tokens that the decode engine alone would, as document and as stream."""
    for prompt in engines.prompts:
        ids = await _tokens(engines, prompt)
        body = _completion(engines, ids) | {"cache_salt": uuid.uuid4().hex}
        first = await _answer(engines, body | await _decode_leg(engines, ids, salt=body["cache_salt"]))
        streamed = _completion(engines, ids) | {"cache_salt": uuid.uuid4().hex} | _STREAM
        leg = await _decode_leg(engines, ids, salt=streamed["cache_salt"])
        events = await _events(engines, "/v1/completions", streamed | leg)
        alone = (await _answer(engines, _completion(engines, ids)))["choices"][0]
        _expect(first["choices"][0]["token_ids"] == alone["token_ids"], f"another answer to {prompt!r}")
        _expect(_streamed_ids(events[:-1]) == alone["token_ids"], f"another stream for {prompt!r}")


async def chat_handoff_takes_token_ids(engines: Engines) -> None:
    """A chat decode leg runs on `kv_transfer_params.prompt_token_ids` and answers as the chat alone."""
    body = _chat(engines)
    question = {"model": engines.model, "messages": body["messages"]}
    ids = (await _post(engines.decode, "/tokenize", question))["tokens"]
    leg = await _decode_leg(engines, ids)
    leg["kv_transfer_params"]["prompt_token_ids"] = ids
    handed = await _answer(engines, body | leg, "/v1/chat/completions")
    alone = await _answer(engines, body, "/v1/chat/completions")
    _expect(handed["choices"][0]["message"] == alone["choices"][0]["message"], "another answer")
    _expect(handed["usage"]["prompt_tokens"] == len(ids), "usage does not count the given ids")


async def counts_a_handoff(engines: Engines) -> None:
    """A hand-off adds an admission and bytes on the decode engine, no failure, and spares it the prompt."""
    ids = await _fresh(engines)
    before = await _stats(engines.decode)
    await _answer(engines, _completion(engines, ids) | await _decode_leg(engines, ids))

    async def counted() -> bool:
        grown = _growth(before, await _stats(engines.decode))
        return (
            grown["num_handoffs_admitted_total"] == 1
            and grown["nixl_bytes_transferred_total"] > 0
            and grown["nixl_num_failed_transfers_total"] == 0
            and grown["prompt_tokens_total"] == len(ids)
            and grown["prompt_tokens_computed_total"] < len(ids)
        )

    await _eventually(counted, "the hand-off is not in the decode engine's stats")


async def a_lost_prefill_engine_costs_a_recompute(engines: Engines) -> None:
    """Parameters of an engine that is gone give the same answer, counted as a failed transfer."""
    ids = await _fresh(engines)
    before = await _stats(engines.decode)
    async with _handoff(engines, ids) as params:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        gone = params | {"remote_engine_id": str(uuid.uuid4()), "remote_host": "127.0.0.1", "remote_port": port}
        handed = await _answer(engines, _completion(engines, ids) | {"kv_transfer_params": gone})
    alone = await _answer(engines, _completion(engines, ids))
    _expect(handed["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"], "another answer")

    async def failed() -> bool:
        return _growth(before, await _stats(engines.decode))["nixl_num_failed_transfers_total"] >= 1

    await _eventually(failed, "no failed transfer is counted")


async def a_disconnect_stops_the_request(engines: Engines) -> None:
    """A caller that leaves mid-stream leaves nothing running."""
    ids = await _tokens(engines, engines.prompts[0])
    body = _completion(engines, ids) | _STREAM | {"max_tokens": _LONG}
    async with asyncio.timeout(60), open_request("POST", f"{engines.decode}/v1/completions", body) as reply:
        await _first_event(reply)
    await _eventually(_idle(engines.decode), "the request still runs")


async def abort_stops_the_request(engines: Engines) -> None:
    """An abort by `X-Request-Id` ends the stream, frees the engine, and may be repeated."""
    ids = await _tokens(engines, engines.prompts[0])
    body = _completion(engines, ids) | _STREAM | {"max_tokens": _LONG}
    request_id = uuid.uuid4().hex
    url = f"{engines.decode}/v1/completions"
    async with asyncio.timeout(60), open_request("POST", url, body, headers={"x-request-id": request_id}) as reply:
        await _first_event(reply)
        aborted = await _post(engines.decode, "/disagg/v1/abort", {"request_id": request_id})
        _expect(aborted["aborted"] is True, f"abort said {aborted}")
        num_events = 0
        with contextlib.suppress(asyncio.IncompleteReadError, ValueError):
            async for _ in reply.frames():
                num_events += 1
        _expect(num_events < _LONG - 1, "the stream ran to its end")
    await _eventually(_idle(engines.decode), "the request still runs")
    again = await _post(engines.decode, "/disagg/v1/abort", {"request_id": request_id})
    _expect(isinstance(again["aborted"], bool), f"a repeated abort said {again}")


async def release_frees_the_prefill_engine(engines: Engines) -> None:
    """A release frees the prefill engine's blocks at once, counts once, and may be repeated."""
    before = await _stats(engines.decode)
    usage = (await _stats(engines.prefill))["kv_cache_usage"]
    params = await _prefill_leg(engines, await _fresh(engines))
    release = {"kv_transfer_params": params}
    first = await _post(engines.decode, "/disagg/v1/release", release)
    second = await _post(engines.decode, "/disagg/v1/release", release)
    _expect((first, second) == ({"released": True}, {"released": False}), f"release said {first}, then {second}")
    grown = _growth(before, await _stats(engines.decode))
    _expect(grown["num_handoffs_released_total"] == 1, "the release is not counted once")

    async def freed() -> bool:
        return bool((await _stats(engines.prefill))["kv_cache_usage"] <= usage)

    await _eventually(freed, "the prefill engine still holds the blocks")


async def a_released_handoff_is_refused(engines: Engines) -> None:
    """Parameters that were released are an error in the OpenAI shape, and the engine goes on."""
    ids = await _fresh(engines)
    params = await _prefill_leg(engines, ids)
    await _post(engines.decode, "/disagg/v1/release", {"kv_transfer_params": params})
    body = _completion(engines, ids) | {"kv_transfer_params": params}
    _expect_error(await request("POST", f"{engines.decode}/v1/completions", body), None)
    await _answer(engines, _completion(engines, ids))


async def an_admitted_handoff_is_not_released(engines: Engines) -> None:
    """A release after the decode leg says false."""
    ids = await _fresh(engines)
    leg = await _decode_leg(engines, ids)
    await _answer(engines, _completion(engines, ids) | leg)
    answer = await _post(engines.decode, "/disagg/v1/release", leg)
    _expect(answer == {"released": False}, f"release said {answer}")


async def probe_runs_a_token(engines: Engines) -> None:
    """A probe of a new prompt runs one token through either engine and finds nothing cached."""
    for url in (engines.prefill, engines.decode):
        found = await _post(url, "/disagg/v1/probe", {"prompt_token_ids": await _fresh(engines)})
        _expect(found["kv_transfer_params"] is None, f"unasked hand-off {found}")
        _expect(found["finish_reason"] == "length", f"finish_reason {found['finish_reason']}")
        _expect(found["num_cached_tokens"] == 0, f"{found['num_cached_tokens']} tokens of a new prompt are cached")


async def probe_follows_a_handoff(engines: Engines) -> None:
    """Two probes make a hand-off: the decode engine then computes no more than the last block."""
    ids = await _fresh(engines)
    asked = {"prompt_token_ids": ids, "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
    params = (await _post(engines.prefill, "/disagg/v1/probe", asked))["kv_transfer_params"]
    _expect(bool(params and params["do_remote_prefill"]), f"no hand-off: {params}")
    body = {"prompt_token_ids": ids, "kv_transfer_params": params}
    found = await _post(engines.decode, "/disagg/v1/probe", body)
    _expect(found["num_cached_tokens"] > 0, "nothing came over")


async def stats_only_grow(engines: Engines) -> None:
    """`/disagg/v1/stats` names engine, role and incarnation, and its totals count every request."""
    before = [await _stats(url) for url in (engines.prefill, engines.decode)]
    _expect([stats["role"] for stats in before] == ["prefill", "decode"], "wrong roles")
    _expect(before[0]["engine_id"] != before[1]["engine_id"], "both engines have one id")
    _expect(all(stats["incarnation"] for stats in before), "no incarnation")
    ids = await _tokens(engines, engines.prompts[0])
    await _answer(engines, _completion(engines, ids))

    async def counted() -> bool:
        after = [await _stats(url) for url in (engines.prefill, engines.decode)]
        grown = [_growth(old, new) for old, new in zip(before, after, strict=True)]
        _expect(all(value >= 0 for growth in grown for value in growth.values()), f"a total shrank: {grown}")
        return grown[1]["generation_tokens_total"] == _NUM_TOKENS and grown[1]["prompt_tokens_total"] == len(ids)

    await _eventually(counted, "the request is not in the totals")


CHECKS: tuple[Check, ...] = (
    lists_its_model,
    reports_health_and_metrics,
    tokenizes_and_back,
    refuses_an_unknown_model,
    refuses_a_prompt_beyond_the_context,
    refuses_malformed_requests,
    counts_usage,
    streams_one_event_a_write,
    streams_a_chat,
    stops_at_a_stop_string,
    answers_n_choices,
    prefill_leg_names_the_handoff,
    same_tokens_with_and_without_handoff,
    chat_handoff_takes_token_ids,
    counts_a_handoff,
    a_disconnect_stops_the_request,
    abort_stops_the_request,
    release_frees_the_prefill_engine,
    a_released_handoff_is_refused,
    an_admitted_handoff_is_not_released,
    probe_runs_a_token,
    probe_follows_a_handoff,
    stats_only_grow,
    a_lost_prefill_engine_costs_a_recompute,
)
"""Every check, the one that may hold a real engine for seconds last."""

_STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def _expect(claim: bool, message: str) -> None:
    if not claim:
        raise AssertionError(message)


def _completion(engines: Engines, ids: Sequence[int]) -> dict[str, Any]:
    return {
        "model": engines.model,
        "prompt": list(ids),
        "max_tokens": _NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def _chat(engines: Engines) -> dict[str, Any]:
    return {
        "model": engines.model,
        "messages": [{"role": "user", "content": engines.prompts[1]}],
        "max_tokens": _NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }


async def _get(url: str, path: str) -> Any:
    reply = await request("GET", url + path)
    _expect(reply.status == 200, f"GET {path}: {reply.status} {reply.body[:300]!r}")
    return reply.json()


async def _post(url: str, path: str, body: Any) -> Any:
    reply = await request("POST", url + path, body)
    _expect(reply.status == 200, f"POST {path}: {reply.status} {reply.body[:300]!r}")
    return reply.json()


async def _stats(url: str) -> dict[str, Any]:
    stats: dict[str, Any] = await _get(url, "/disagg/v1/stats")
    return stats


async def _tokens(engines: Engines, prompt: str) -> list[int]:
    ids: list[int] = (await _post(engines.decode, "/tokenize", {"model": engines.model, "prompt": prompt}))["tokens"]
    return ids


async def _fresh(engines: Engines) -> list[int]:
    """A prompt that no engine has seen: the first one's tokens, shuffled."""
    ids = await _tokens(engines, engines.prompts[0])
    random.SystemRandom().shuffle(ids)
    return ids


async def _answer(engines: Engines, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    return await _post(engines.decode, path, body)


async def _prefill_leg(engines: Engines, ids: Sequence[int], salt: str | None = None) -> dict[str, Any]:
    body = _completion(engines, ids) | {"max_tokens": 1, "stream": False}
    body["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
    if salt:
        body["cache_salt"] = salt
    answer = await _post(engines.prefill, "/v1/completions", body)
    _expect(answer["usage"]["completion_tokens"] == 1, "a prefill leg is one token")
    params = answer["kv_transfer_params"]
    _expect(isinstance(params, dict) and params["do_remote_prefill"] is True, f"no hand-off: {params}")
    return dict(params)


async def _decode_leg(engines: Engines, ids: Sequence[int], salt: str | None = None) -> dict[str, Any]:
    return {"kv_transfer_params": await _prefill_leg(engines, ids, salt)}


@contextlib.asynccontextmanager
async def _handoff(engines: Engines, ids: Sequence[int]) -> AsyncIterator[dict[str, Any]]:
    """A hand-off that is given back at the end."""
    params = await _prefill_leg(engines, ids)
    try:
        yield params
    finally:
        await _post(engines.decode, "/disagg/v1/release", {"kv_transfer_params": params})


async def _events(engines: Engines, path: str, body: dict[str, Any]) -> list[Any]:
    """The JSON of every event before `[DONE]`, each seen to be one write."""
    async with asyncio.timeout(60), open_request("POST", engines.decode + path, body) as reply:
        _expect(reply.status == 200, f"{path} answered {reply.status}")
        kind = reply.headers.get("content-type", "")
        _expect(kind.startswith("text/event-stream"), f"content-type {kind!r}")
        frames = [frame async for frame in reply.frames()]
    for frame in frames:
        one_event = frame.startswith(b"data: ") and frame.endswith(b"\n\n") and frame.count(b"\n\n") == 1
        _expect(one_event, f"not one event a write: {frame!r}")
    _expect(frames[-1] == b"data: [DONE]\n\n", f"ends with {frames[-1]!r}")
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames[:-1]]


def _streamed_ids(events: Sequence[Any]) -> list[int]:
    return [token for event in events for token in event["choices"][0]["token_ids"]]


def _counts(usage: dict[str, Any]) -> dict[str, Any]:
    return {key: usage[key] for key in ("prompt_tokens", "total_tokens", "completion_tokens")}


async def _first_event(reply: OpenReply) -> None:
    _expect(reply.status == 200, f"status {reply.status}")
    frames = reply.frames()
    await anext(frames)


def _expect_error(reply: Reply, status: int | None) -> None:
    """An error in the OpenAI shape; any 4xx or 5xx when `status` is None."""
    right = reply.status == status if status else reply.status >= 400
    _expect(right, f"status {reply.status}, expected {status or 'an error'}: {reply.body[:300]!r}")
    error = reply.json()["error"]
    _expect(bool(error["message"]) and bool(error["type"]) and "param" in error, f"error shape {error}")
    _expect(error["code"] == reply.status, f"code {error['code']} in a {reply.status}")


def _growth(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    return {key: after[key] - before[key] for key in before if key.endswith("_total")}


def _idle(url: str) -> Callable[[], Awaitable[bool]]:
    async def idle() -> bool:
        stats = await _stats(url)
        return bool(stats["num_requests_running"] == 0 == stats["num_requests_waiting"])

    return idle


async def _eventually(claim: Callable[[], Awaitable[bool]], message: str) -> None:
    deadline = time.monotonic() + _SETTLE_S
    while not await claim():
        _expect(time.monotonic() < deadline, message)
        await asyncio.sleep(0.05)
