# SPDX-License-Identifier: Apache-2.0
"""The fake engine without a socket: text, timing, KV accounting and wire shapes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pools.config import FakeEngineConfig
from pools.engine.fake import openai_shapes as fake_wire
from pools.engine.fake.engine import FakeEngine
from pools.engine.fake.kv import FakeKV
from pools.engine.fake.text import answer, decode, encode, render_chat, token_at, word
from pools.errors import EngineDeadError, HandoffRefusedError
from transport.handoff_params import DO_REMOTE_PREFILL, REMOTE_DECODE

PROMPT = encode("a prompt of more than one block of sixteen tokens")


def engine(role: Any = "decode", **fields: Any) -> FakeEngine:
    fast = {"itl_ms": 0, "prefill_ms_per_1k_tokens": 0, "transfer_ms_per_1k_tokens": 0}
    return FakeEngine("engine-1", role, FakeEngineConfig(type="fake", **(fast | fields)), model_id="tiny")


async def post(target: FakeEngine, path: str, body: Any) -> tuple[int, list[bytes]]:
    """Status and the writes of one request against the ASGI app."""
    sent: list[Any] = []
    left = asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"r1")]
    await target.app({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
    return sent[0]["status"], [message["body"] for message in sent[1:]]


def complete(target: FakeEngine, **fields: Any) -> tuple[int, list[bytes]]:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4} | fields
    return asyncio.run(post(target, "/v1/completions", body))


def test_an_answer_goes_on_from_prompt_plus_tokens() -> None:
    """Continuing from prompt and sent tokens gives the rest of the same answer."""
    whole = answer(PROMPT, 20)
    assert answer(PROMPT + whole[:7], 13) == whole[7:]
    assert token_at(PROMPT, 7) == whole[7]
    assert whole != answer([*PROMPT, 1], 20)


def test_text_goes_to_tokens_and_back() -> None:
    """The byte tokenizer is inverse on text, and words of answers have a text."""
    assert decode(encode("déjà vu ✓")) == "déjà vu ✓"
    assert decode([256, 300]) == word(256) + word(300) == " w0 w44"


def test_a_chat_renders_every_part() -> None:
    """Strings, parts and absent content all reach the prompt, a message without a role does not."""
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    rendered = render_chat([{"role": "system", "content": "a"}, {"role": "user", "content": parts}])
    assert rendered == "<|system|>a\n<|user|>bc\n<|assistant|>"
    with pytest.raises(ValueError, match="role"):
        render_chat([{"content": "a"}])


def test_a_stream_is_an_event_a_write() -> None:
    """A completion stream writes each token, usage and the end separately."""
    status, writes = complete(engine(), stream=True, stream_options={"include_usage": True})
    *events, usage = [json.loads(write.removeprefix(b"data: ")) for write in writes[:-1]]
    assert (status, writes[-1]) == (200, b"data: [DONE]\n\n")
    assert [event["choices"][0]["text"] for event in events] == [word(token) for token in answer(PROMPT, 4)]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "length"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4


def test_an_answer_without_a_limit_ends_by_itself() -> None:
    """A chat without max_tokens stops where its text ends, and goes on when EOS is ignored."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    target = engine(max_model_len=1000)
    _, writes = asyncio.run(post(target, "/v1/chat/completions", body))
    assert json.loads(writes[0])["choices"][0]["finish_reason"] == "stop"
    _, writes = asyncio.run(post(target, "/v1/chat/completions", body | {"ignore_eos": True}))
    assert json.loads(writes[0])["usage"]["total_tokens"] == 1000


@pytest.mark.parametrize(
    ("stop", "texts", "found"),
    [
        (["w2"], [" w1", " "], "w2"),
        (["1 w"], [" w", ""], "1 w"),
        (["w3", "w2"], [" w1", " "], "w2"),
        (["x"], None, None),
        ([""], None, None),
    ],
)
def test_stop_strings_cut_the_text(stop: list[str], texts: list[str] | None, found: str | None) -> None:
    """The first stop string to be complete ends the answer before itself, also across tokens."""
    cut = fake_wire.cut_at_stop([" w1", " w2", " w3"], stop)
    assert cut == (None if texts is None else (texts, found))


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"prompt": None}, 400, "body.prompt"),
        ({"prompt": []}, 400, "body.prompt"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**6}, 400, "input_tokens"),
        ({"n": "2"}, 400, "body.n"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"kv_transfer_params": "x"}, 400, "body.kv_transfer_params"),
    ],
)
def test_a_bad_request_is_refused_as_vllm_does(fields: dict[str, Any], status: int, param: str) -> None:
    """A request that cannot run has vLLM's status and error shape."""
    got, writes = complete(engine(), **fields)
    error = json.loads(writes[0])["error"]
    assert (got, error["code"], error["param"]) == (status, status, param)


def test_a_prefill_leg_pins_until_the_lease_ends() -> None:
    """A hand-off holds its blocks, and an expired one is freed and counted."""
    now = [0.0]
    config = FakeEngineConfig(type="fake", itl_ms=0, prefill_ms_per_1k_tokens=0)
    target = FakeEngine("e", "prefill", config, model_id="tiny", kv_lease_duration_s=30, clock=lambda: now[0])
    _, writes = complete(target, max_tokens=1, kv_transfer_params=REMOTE_DECODE)
    params = json.loads(writes[0])["kv_transfer_params"]
    assert (params["remote_engine_id"], params[DO_REMOTE_PREFILL]) == ("e", True)
    assert target.stats().kv_cache_usage > 0
    now[0] = 30.0
    assert target.stats().kv_cache_usage == 0
    assert target.stats().num_kv_expired_reqs_total == 1


def test_unreachable_parameters_are_recomputed_and_counted() -> None:
    """Parameters without an address give the same answer and one failed transfer."""
    target = engine()
    gone = {DO_REMOTE_PREFILL: True, "remote_engine_id": "x", "remote_request_id": "y"}
    _, handed = complete(target, kv_transfer_params=gone)
    _, alone = complete(engine())
    assert json.loads(handed[0])["choices"] == json.loads(alone[0])["choices"]
    assert target.stats().nixl_num_failed_transfers_total == 1


def test_parameters_are_used_once() -> None:
    """What was admitted before is refused, by requests and probes."""
    target = engine()
    params = {DO_REMOTE_PREFILL: True, "remote_engine_id": "x", "remote_request_id": "y"}
    assert complete(target, kv_transfer_params=params)[0] == 200
    assert complete(target, kv_transfer_params=params)[0] == 409
    with pytest.raises(HandoffRefusedError):
        asyncio.run(target.probe(PROMPT, params))
    assert target.stats().num_handoffs_admitted_total == 1


def test_a_repeated_prompt_is_cached_by_block() -> None:
    """A second probe finds every whole block but never the whole prompt."""
    target = engine()
    first, second = (asyncio.run(target.probe(PROMPT)) for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, len(PROMPT) // 16 * 16)
    assert target.stats().prompt_tokens_computed_total == len(PROMPT) + len(PROMPT) % 16


def test_the_prefix_cache_keeps_salts_apart() -> None:
    """A prefix cached under one salt is not found under another, and the oldest block leaves first."""
    kv = FakeKV(num_blocks=2, block_size=2, lease_s=30, clock=lambda: 0.0)
    kv.cache([1, 2, 3, 4], "a")
    assert kv.cached_tokens([1, 2, 3, 4, 5], "a") == 4
    assert kv.cached_tokens([1, 2, 3, 4], "a") == 2
    assert kv.cached_tokens([1, 2, 3, 4, 5], "b") == 0
    kv.cache([9, 9], "a")
    assert kv.cached_tokens([1, 2, 3, 4, 5], "a") == 0


def test_an_abort_ends_a_running_stream() -> None:
    """An abort by request id ends the stream with finish_reason abort and leaves no request."""

    async def run() -> tuple[bool, bool, list[bytes]]:
        target = engine(itl_ms=5)
        body = {"prompt": PROMPT, "max_tokens": 1000, "stream": True}
        stream = asyncio.create_task(post(target, "/v1/completions", body))
        await asyncio.sleep(0.02)
        aborted = await target.abort("r1")
        _, writes = await stream
        assert target.stats().num_requests_running == 0
        return aborted, await target.abort("r1"), writes

    aborted, again, writes = asyncio.run(run())
    assert (aborted, again, writes[-1]) == (True, False, b"data: [DONE]\n\n")
    assert json.loads(writes[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "abort"


def test_requests_wait_for_a_free_slot() -> None:
    """Beyond max_num_seqs a request waits, and all are answered in the end."""

    async def run() -> tuple[int, int]:
        target = engine(max_num_seqs=1, itl_ms=10)
        body = {"prompt": PROMPT, "max_tokens": 3}
        tasks = [asyncio.create_task(post(target, "/v1/completions", body)) for _ in range(2)]
        await asyncio.sleep(0.01)
        stats = target.stats()
        assert [status for status, _ in await asyncio.gather(*tasks)] == [200, 200]
        return stats.num_requests_running, stats.num_requests_waiting

    assert asyncio.run(run()) == (1, 1)


def test_a_dead_engine_refuses_everything() -> None:
    """After a failure requests are a 500, a running stream ends in an error event, and probes raise."""

    async def run() -> list[bytes]:
        target = engine(itl_ms=5)
        body = {"prompt": PROMPT, "max_tokens": 1000, "stream": True}
        stream = asyncio.create_task(post(target, "/v1/completions", body))
        await asyncio.sleep(0.01)
        target.fail(RuntimeError("core died"))
        _, writes = await stream
        assert (await post(target, "/v1/completions", body))[0] == 500
        with pytest.raises(EngineDeadError):
            await target.probe(PROMPT)
        return writes

    writes = asyncio.run(run())
    assert json.loads(writes[-2].removeprefix(b"data: "))["error"]["code"] == 500
