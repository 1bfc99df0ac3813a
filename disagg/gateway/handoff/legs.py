# SPDX-License-Identifier: Apache-2.0
"""What the two legs of a request send. Pure.

Source of the rules: vLLM 0.32, its transfer protocols and the OpenAI routes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from disagg.gateway.front.fields import Endpoint

_encode = msgspec.json.Encoder().encode


def prefill_body(
    model: str,
    prompt_token_ids: Sequence[int],
    kv_transfer_params: Mapping[str, Any],
    *,
    cache_salt: str | None,
) -> bytes:
    """The prefill leg: the same prompt, one token, nothing else of the request.

    Everything that could end it early, repeat it or make it cost more is left out, so that its KV is always offered.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt_token_ids),
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "kv_transfer_params": kv_transfer_params,
    }
    if cache_salt is not None:
        body["cache_salt"] = cache_salt
    return _encode(body)


def decode_body(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    prompt_token_ids: Sequence[int],
    kv_transfer_params: Mapping[str, Any],
) -> bytes:
    """The decode leg of a hand-off: the client's request, the tokens already made of it, and where its KV is.

    `echo` and `suffix` need the prompt's text, so there the prompt stays as the client sent it.
    """
    sent = dict(body)
    if endpoint == "chat":
        sent["kv_transfer_params"] = {**kv_transfer_params, "prompt_token_ids": list(prompt_token_ids)}
    else:
        sent["kv_transfer_params"] = dict(kv_transfer_params)
        if not body.get("echo") and body.get("suffix") is None:
            sent["prompt"] = list(prompt_token_ids)
    return _encode(sent)
