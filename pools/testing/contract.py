# SPDX-License-Identifier: Apache-2.0
"""The contract of an engine as checks over HTTP: what any prefill and decode engine must do, real or fake.

`check_engine` runs them all; a test may also parametrize over `CHECKS`. The engines must be otherwise idle,
because some checks read their counters.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence

from pools.client import routes
from pools.testing.client import open_request, request
from pools.testing.handoffs import (
    a_lost_prefill_engine_costs_a_recompute,
    cached_tokens_were_there_before,
    chat_handoff_takes_token_ids,
    counts_a_handoff,
    events_are_a_long_poll,
    parameters_are_used_once,
    prefill_leg_names_the_handoff,
    probe_follows_a_handoff,
    probe_runs_a_token,
    same_tokens_with_and_without_handoff,
    says_what_became_of_a_handoff,
    settle_after_the_read_changes_nothing,
    settle_frees_the_prefill_engine,
    settle_may_come_first,
    tells_what_it_never_took,
)
from pools.testing.tools import (
    LONG,
    NUM_TOKENS,
    STREAM,
    Check,
    Engines,
    answer_of,
    chat_body,
    completion_body,
    counts_of,
    eventually,
    expect,
    expect_error,
    first_event,
    get_json,
    growth_of,
    idle_claim,
    post_json,
    stats_of,
    streamed_events,
    streamed_ids,
    tokens_of,
)

__all__ = ["CHECKS", "Check", "Engines", "check_engine"]


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
        cards = {card["id"]: card for card in (await get_json(url, "/v1/models"))["data"]}
        expect(engines.model in cards, f"{engines.model!r} is not in {sorted(cards)}")
        expect(cards[engines.model]["max_model_len"] > 0, "max_model_len is missing")


async def reports_health_and_metrics(engines: Engines) -> None:
    """`/health` answers 200 and `/metrics` carries vLLM's load gauges."""
    for url in (engines.prefill, engines.decode):
        expect((await request("GET", f"{url}/health")).status == 200, "/health is not 200")
        text = (await request("GET", f"{url}/metrics")).body.decode()
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
            expect(f"\n{name}" in text, f"{name} is missing")


async def tokenizes_and_back(engines: Engines) -> None:
    """`/tokenize` and `/detokenize` are inverse on plain text."""
    ids = await tokens_of(engines, engines.prompts[0])
    text = (await post_json(engines.decode, "/detokenize", {"model": engines.model, "tokens": ids}))["prompt"]
    expect(engines.prompts[0] in text, f"{engines.prompts[0]!r} became {text!r}")


async def refuses_an_unknown_model(engines: Engines) -> None:
    """A model that is not served is a 404 in the OpenAI error shape."""
    body = completion_body(engines, await tokens_of(engines, engines.prompts[0])) | {"model": "no-such-model"}
    expect_error(await request("POST", f"{engines.decode}/v1/completions", body), 404)


async def refuses_a_prompt_beyond_the_context(engines: Engines) -> None:
    """A prompt longer than the context is a 400 in the OpenAI error shape."""
    card = (await get_json(engines.decode, "/v1/models"))["data"][0]
    ids = await tokens_of(engines, engines.prompts[0])
    too_long = (ids * (card["max_model_len"] // len(ids) + 1))[: card["max_model_len"] + 1]
    expect_error(await request("POST", f"{engines.decode}/v1/completions", completion_body(engines, too_long)), 400)


async def refuses_malformed_requests(engines: Engines) -> None:
    """Broken JSON and missing fields are a 400 in the OpenAI error shape."""
    expect_error(await request("POST", f"{engines.decode}/v1/completions", b'{"model":'), 400)
    expect_error(await request("POST", f"{engines.decode}/v1/chat/completions", {"model": engines.model}), 400)


async def counts_usage(engines: Engines) -> None:
    """`usage` counts the prompt's and the answer's tokens, and `max_tokens` ends it with `length`."""
    ids = await tokens_of(engines, engines.prompts[0])
    answer = await answer_of(engines, completion_body(engines, ids))
    usage = answer["usage"]
    expect(usage["prompt_tokens"] == len(ids), f"prompt_tokens {usage['prompt_tokens']}, sent {len(ids)}")
    expect(usage["completion_tokens"] == NUM_TOKENS, f"completion_tokens {usage['completion_tokens']}")
    expect(usage["total_tokens"] == len(ids) + NUM_TOKENS, f"total_tokens {usage['total_tokens']}")
    expect(answer["choices"][0]["finish_reason"] == "length", "finish_reason is not length")


async def streams_one_event_a_write(engines: Engines) -> None:
    """A stream is one SSE event a write, has the tokens of the plain answer, then usage, then `[DONE]`."""
    body = completion_body(engines, await tokens_of(engines, engines.prompts[0]))
    plain = await answer_of(engines, body)
    events = await streamed_events(engines, "/v1/completions", body | STREAM)
    usage = events.pop()
    expect(usage["choices"] == [] and counts_of(usage["usage"]) == counts_of(plain["usage"]), f"usage event {usage}")
    expect(streamed_ids(events) == plain["choices"][0]["token_ids"], "stream and document differ")
    expect("".join(event["choices"][0]["text"] for event in events) == plain["choices"][0]["text"], "texts differ")
    expect([event["choices"][0]["finish_reason"] for event in events][-1] == "length", "no finish_reason")


async def streams_a_chat(engines: Engines) -> None:
    """A chat stream opens with the role, then has content, a finish reason, usage and `[DONE]`."""
    body = chat_body(engines)
    plain = await answer_of(engines, body, "/v1/chat/completions")
    first, *events, usage = await streamed_events(engines, "/v1/chat/completions", body | STREAM)
    expect(first["choices"][0]["delta"] == {"role": "assistant", "content": ""}, f"first event {first}")
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    expect(text == plain["choices"][0]["message"]["content"], "stream and document differ")
    expect(events[-1]["choices"][0]["finish_reason"] == "length", "no finish_reason")
    expect(usage["choices"] == [] and usage["usage"]["completion_tokens"] == NUM_TOKENS, f"usage event {usage}")


async def stops_at_a_stop_string(engines: Engines) -> None:
    """A stop string ends the answer before it, with `finish_reason` stop and the string as `stop_reason`."""
    body = completion_body(engines, await tokens_of(engines, engines.prompts[0]))
    text = (await answer_of(engines, body))["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    if not stop.strip() or not text.isascii():
        return
    choice = (await answer_of(engines, body | {"stop": [stop]}))["choices"][0]
    expect(choice["text"] == text[: text.index(stop)], f"{choice['text']!r} from {text!r} with stop {stop!r}")
    expect((choice["finish_reason"], choice["stop_reason"]) == ("stop", stop), f"ended with {choice}")


async def answers_n_choices(engines: Engines) -> None:
    """`n` gives that many choices, numbered from 0."""
    ids = await tokens_of(engines, engines.prompts[0])
    answer = await answer_of(engines, completion_body(engines, ids) | {"n": 2, "temperature": 1.0})
    expect([choice["index"] for choice in answer["choices"]] == [0, 1], "not two choices")
    expect(answer["usage"]["completion_tokens"] == 2 * NUM_TOKENS, "usage does not count every choice")


async def a_disconnect_stops_the_request(engines: Engines) -> None:
    """A caller that leaves mid-stream leaves nothing running."""
    ids = await tokens_of(engines, engines.prompts[0])
    body = completion_body(engines, ids) | STREAM | {"max_tokens": LONG}
    async with asyncio.timeout(60), open_request("POST", f"{engines.decode}/v1/completions", body) as reply:
        await first_event(reply)
    await eventually(idle_claim(engines.decode), "the request still runs")


async def abort_stops_the_request(engines: Engines) -> None:
    """An abort by `X-Request-Id` ends the stream, frees the engine, and may be repeated."""
    ids = await tokens_of(engines, engines.prompts[0])
    body = completion_body(engines, ids) | STREAM | {"max_tokens": LONG}
    request_id = uuid.uuid4().hex
    url = f"{engines.decode}/v1/completions"
    async with asyncio.timeout(60), open_request("POST", url, body, headers={"x-request-id": request_id}) as reply:
        await first_event(reply)
        aborted = await post_json(engines.decode, routes.ABORT, {"request_id": request_id})
        expect(aborted["aborted"] is True, f"abort said {aborted}")
        num_events = 0
        with contextlib.suppress(asyncio.IncompleteReadError, ValueError):
            async for _ in reply.frames():
                num_events += 1
        expect(num_events < LONG - 1, "the stream ran to its end")
    await eventually(idle_claim(engines.decode), "the request still runs")
    again = await post_json(engines.decode, routes.ABORT, {"request_id": request_id})
    expect(isinstance(again["aborted"], bool), f"a repeated abort said {again}")


async def stats_only_grow(engines: Engines) -> None:
    """`/disagg/v1/stats` names engine, role and incarnation, and its totals count every request."""
    before = [await stats_of(url) for url in (engines.prefill, engines.decode)]
    expect([stats["role"] for stats in before] == ["prefill", "decode"], "wrong roles")
    expect(before[0]["engine_id"] != before[1]["engine_id"], "both engines have one id")
    expect(all(stats["incarnation"] for stats in before), "no incarnation")
    ids = await tokens_of(engines, engines.prompts[0])
    await answer_of(engines, completion_body(engines, ids))

    async def counted() -> bool:
        after = [await stats_of(url) for url in (engines.prefill, engines.decode)]
        grown = [growth_of(old, new) for old, new in zip(before, after, strict=True)]
        expect(all(value >= 0 for growth in grown for value in growth.values()), f"a total shrank: {grown}")
        return grown[1]["generation_tokens_total"] == NUM_TOKENS and grown[1]["prompt_tokens_total"] == len(ids)

    await eventually(counted, "the request is not in the totals")


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
    says_what_became_of_a_handoff,
    settle_frees_the_prefill_engine,
    settle_may_come_first,
    tells_what_it_never_took,
    settle_after_the_read_changes_nothing,
    parameters_are_used_once,
    events_are_a_long_poll,
    probe_runs_a_token,
    cached_tokens_were_there_before,
    probe_follows_a_handoff,
    stats_only_grow,
    a_lost_prefill_engine_costs_a_recompute,
)
"""Every check, the one that may hold a real engine for seconds last."""
