# SPDX-License-Identifier: Apache-2.0
"""What each leg sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg.gateway.handoff.legs import (
    decode_body,
    prefill_body,
)
from transport.handoff_params import REMOTE_DECODE, REMOTE_PREFILL

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
