# SPDX-License-Identifier: Apache-2.0
"""What each leg sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg.gateway.handoff.legs import (
    decode_body,
    prefill_body,
    prefill_reply,
    probe_body,
    transfer_params,
)
from transport.handoff_params import DO_REMOTE_PREFILL, REMOTE_DECODE, REMOTE_PREFILL

ONE = [[1, 2, 3]]
PARAMS = {**REMOTE_PREFILL, "remote_block_ids": [[4]], "remote_engine_id": "e"}


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
        {"kv_transfer_params": {**PARAMS, DO_REMOTE_PREFILL: False}},
        {"kv_transfer_params": {**PARAMS, "remote_block_ids": []}},
        {"kv_transfer_params": {**PARAMS, "remote_block_ids": None}},
    ],
    ids=["absent", "null", "text", "list", "no remote prefill", "no blocks", "null blocks"],
)
def test_an_offer_without_blocks_is_none(response: dict[str, Any]) -> None:
    """Parameters that decode could not pull with are not used."""
    assert transfer_params(response) is None
    assert transfer_params({"kv_transfer_params": PARAMS}) == PARAMS
