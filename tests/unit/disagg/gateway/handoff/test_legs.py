# SPDX-License-Identifier: Apache-2.0
"""What each leg sends, and which requests are handed off."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg.gateway.front.fields import Endpoint
from disagg.gateway.handoff.legs import (
    MAX_PRIMED_PROMPTS,
    REMOTE_DECODE,
    Route,
    decode_body,
    offer_params,
    prefill_body,
    prefill_reply,
    probe_body,
    route_for,
    transfer_params,
)

ONE = [[1, 2, 3]]
PARAMS = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[4]], "remote_engine_id": "e"}

ROUTES: dict[str, tuple[Endpoint, dict[str, Any], list[list[int]] | None, Route]] = {
    "plain completion": ("completions", {}, ONE, Route("handoff")),
    "plain chat": ("chat", {}, ONE, Route("handoff")),
    "streamed, stopped, sampled": ("chat", {"stream": True, "stop": ["x"], "temperature": 1}, ONE, Route("handoff")),
    "logprobs of the answer": ("completions", {"logprobs": 3}, ONE, Route("handoff")),
    "chat logprobs": ("chat", {"logprobs": True, "top_logprobs": 2}, ONE, Route("handoff")),
    "echo": ("completions", {"echo": True}, ONE, Route("handoff")),
    "tools": ("chat", {"tools": [{}], "tool_choice": "auto"}, ONE, Route("handoff")),
    "min_tokens": ("completions", {"min_tokens": 5}, ONE, Route("handoff")),
    "n is one": ("chat", {"n": 1, "best_of": 1}, ONE, Route("handoff")),
    "n is null": ("chat", {"n": None, "best_of": None}, ONE, Route("handoff")),
    "not rendered": ("completions", {}, None, Route("local", "not_rendered")),
    "no prompts": ("completions", {}, [], Route("local", "empty_prompt")),
    "empty prompt": ("completions", {}, [[]], Route("local", "empty_prompt")),
    "one of two empty": ("completions", {}, [[1], []], Route("local", "empty_prompt")),
    "prompt logprobs": ("chat", {"prompt_logprobs": 0}, ONE, Route("local", "prompt_logprobs")),
    "echo with logprobs": ("completions", {"echo": True, "logprobs": 0}, ONE, Route("local", "prompt_logprobs")),
    "echo in chat is no echo": ("chat", {"echo": True, "logprobs": True}, ONE, Route("handoff")),
    "beam search": ("completions", {"use_beam_search": True, "n": 4}, ONE, Route("local", "beam_search")),
    "several choices": ("completions", {"n": 2}, ONE, Route("primed", "n")),
    "best of several": ("completions", {"best_of": 3}, ONE, Route("primed", "n")),
    "n as text": ("completions", {"n": "2"}, ONE, Route("primed", "n")),
    "n as a float": ("completions", {"n": 2.0}, ONE, Route("primed", "n")),
    "two prompts": ("completions", {}, [[1], [2]], Route("primed", "prompt_list")),
    "many prompts": ("completions", {}, [[1]] * MAX_PRIMED_PROMPTS, Route("primed", "prompt_list")),
    "too many prompts": ("completions", {}, [[1]] * (MAX_PRIMED_PROMPTS + 1), Route("local", "prompt_list")),
}


@pytest.mark.parametrize("case", ROUTES.values(), ids=ROUTES.keys())
def test_route(case: tuple[Endpoint, dict[str, Any], list[list[int]] | None, Route]) -> None:
    """Each kind of request gets its KV the way it can."""
    endpoint, body, prompts, expected = case
    assert route_for(endpoint, body, prompts, min_handoff_tokens=1) == expected


def test_short_prompts_stay_on_decode() -> None:
    """Below the limit the decode engine prefills itself, at the limit it does not; the longest prompt counts."""
    assert route_for("chat", {}, [[1] * 9], min_handoff_tokens=10) == Route("local", "short")
    assert route_for("chat", {}, [[1] * 10], min_handoff_tokens=10) == Route("handoff")
    assert route_for("completions", {}, [[1], [1] * 10], min_handoff_tokens=10) == Route("primed", "prompt_list")
    assert route_for("chat", {}, ONE, min_handoff_tokens=0) == Route("handoff")


def test_prefill_leg_holds_only_what_it_needs() -> None:
    """The prefill leg is the prompt, one token and the offer; of the request only the cache salt gets in."""
    assert json.loads(prefill_body("m", [5, 6], REMOTE_DECODE, cache_salt=None)) == {
        "model": "m",
        "prompt": [5, 6],
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "kv_transfer_params": REMOTE_DECODE,
    }
    assert json.loads(prefill_body("m", (5, 6), {}, cache_salt="tenant"))["cache_salt"] == "tenant"


def test_offer_names_the_handoff_and_what_the_client_said() -> None:
    """Every offer carries its id; only a client that said something changes what is stored."""
    assert offer_params("g-1", None) == {**REMOTE_DECODE, "disagg.handoff_id": "g-1"}
    assert offer_params("g-1", "always") == {**offer_params("g-1", None), "disagg.store": "always"}
    never = {"disagg.store": "never", "lmcache.max_offload_tokens": 0}
    assert offer_params("g-1", "never") == {**offer_params("g-1", None), **never}


@pytest.mark.parametrize(
    ("status", "body", "offers", "complete"),
    [
        (200, {"choices": [{"finish_reason": "length"}], "kv_transfer_params": PARAMS}, True, True),
        (200, {"choices": [{"finish_reason": "length"}], "kv_transfer_params": None}, False, True),
        (200, {"choices": [{"finish_reason": "abort"}]}, False, False),
        (200, {"choices": [{"finish_reason": "stop"}]}, False, False),
        (200, {"choices": []}, False, False),
        (200, {"choices": "x"}, False, False),
        (200, {"finish_reason": "length", "kv_transfer_params": PARAMS}, True, True),
        (500, {"choices": [{"finish_reason": "length"}], "kv_transfer_params": PARAMS}, False, False),
        (200, [], False, False),
    ],
)
def test_prefill_reply(status: int, body: Any, offers: bool, complete: bool) -> None:
    """A leg or a probe hands something over only when it answered and ended with its one token."""
    reply = prefill_reply(status, json.dumps(body).encode())
    assert (reply.status, reply.params, reply.complete) == (status, PARAMS if offers else None, complete)


def test_chat_decode_leg_keeps_the_request() -> None:
    """A chat goes on as it came; its tokens travel inside the transfer parameters."""
    body = {"model": "m", "messages": [{"role": "user", "content": "é"}], "tools": [{}], "n": 1, "stream": True}
    sent = json.loads(decode_body("chat", body, [5, 6], PARAMS))
    assert sent == {**body, "kv_transfer_params": {**PARAMS, "prompt_token_ids": [5, 6]}}
    assert "kv_transfer_params" not in body and "prompt_token_ids" not in PARAMS


@pytest.mark.parametrize(
    ("extra", "sends_ids"),
    [
        ({}, True),
        ({"echo": False, "suffix": None}, True),
        ({"echo": True}, False),
        ({"suffix": "end"}, False),
        ({"suffix": ""}, False),
    ],
    ids=["plain", "echo off", "echo", "suffix", "empty suffix"],
)
def test_completion_decode_leg_sends_ids_unless_text_is_needed(extra: dict[str, Any], sends_ids: bool) -> None:
    """Completions carry the token ids, but where the engine has to see the text."""
    body = {"model": "m", "prompt": "text", "stop": ["x"], **extra}
    sent = json.loads(decode_body("completions", body, [5, 6], PARAMS))
    assert sent == {**body, "prompt": [5, 6] if sends_ids else "text", "kv_transfer_params": PARAMS}


def test_probe_carries_parameters_or_none() -> None:
    """A probe names its parameters even when there are none."""
    assert json.loads(probe_body([1], None)) == {"prompt_token_ids": [1], "kv_transfer_params": None}
    assert json.loads(probe_body([1], PARAMS))["kv_transfer_params"] == PARAMS
    assert json.loads(probe_body([1], None, "salt"))["cache_salt"] == "salt"


@pytest.mark.parametrize(
    "response",
    [
        {},
        {"kv_transfer_params": None},
        {"kv_transfer_params": "text"},
        {"kv_transfer_params": []},
        {"kv_transfer_params": {**PARAMS, "do_remote_prefill": False}},
        {"kv_transfer_params": {**PARAMS, "remote_block_ids": []}},
        {"kv_transfer_params": {**PARAMS, "remote_block_ids": None}},
    ],
    ids=["absent", "null", "text", "list", "no remote prefill", "no blocks", "null blocks"],
)
def test_an_offer_without_blocks_is_none(response: dict[str, Any]) -> None:
    """Parameters that decode could not pull with are not used."""
    assert transfer_params(response) is None
    assert transfer_params({"kv_transfer_params": PARAMS}) == PARAMS
