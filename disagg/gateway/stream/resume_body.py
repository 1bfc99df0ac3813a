# SPDX-License-Identifier: Apache-2.0
"""The body of a request that resumes a stream: the next replica continues the answer after the cut. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from disagg.gateway.handoff.call import Call

_DEFAULT_COMPLETION_TOKENS = 16
"""Tokens that vLLM generates at most for a completion without `max_tokens`."""

_encode = msgspec.json.Encoder().encode


def num_left(call: Call, num_tokens: int) -> int | None:
    """How many tokens may still be generated after `num_tokens`; None when only the model's length ends it."""
    body = call.body
    if call.endpoint == "completions":
        asked = body.get("max_tokens")
        return (_DEFAULT_COMPLETION_TOKENS if asked is None else asked) - num_tokens
    asked = body.get("max_completion_tokens")
    asked = body.get("max_tokens") if asked is None else asked
    return None if asked is None else asked - num_tokens


def continued(call: Call, token_ids: Sequence[int]) -> Call:
    """The request that continues an answer after its first tokens, `token_ids`. At least one token must be left.

    `call` has one prompt. A chat carries the ids in `kv_transfer_params`: vLLM takes them from there in place of the
    rendered messages, and its parsers still run. A completion carries the ids as its prompt.
    """
    assert call.prompts is not None
    prompt = [*call.prompts[0], *token_ids]
    body: dict[str, Any] = dict(call.body)
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            body[name] -= len(token_ids)
    if call.endpoint == "completions":
        body["max_tokens"] = num_left(call, len(token_ids))
    if body.get("min_tokens"):
        body["min_tokens"] = max(0, body["min_tokens"] - len(token_ids))
    return replace(call, body=body, raw=_encode(_local(call, body, prompt)), prompts=[prompt])


def _local(call: Call, body: Mapping[str, Any], prompt: list[int]) -> dict[str, Any]:
    if call.endpoint == "chat":
        return {**body, "kv_transfer_params": {"prompt_token_ids": prompt}}
    return {**body, "prompt": prompt}
