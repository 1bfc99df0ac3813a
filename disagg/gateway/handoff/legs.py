# SPDX-License-Identifier: Apache-2.0
"""What the two legs of a request send. Pure.

Source of the rules: vLLM 0.32, its transfer protocols and the OpenAI routes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from disagg.gateway.front.fields import Endpoint
from transport.handoff_params import DO_REMOTE_PREFILL

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


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


def probe_body(
    prompt_token_ids: Sequence[int], kv_transfer_params: Mapping[str, Any] | None, cache_salt: str | None = None
) -> bytes:
    body: dict[str, Any] = {"prompt_token_ids": list(prompt_token_ids), "kv_transfer_params": kv_transfer_params}
    if cache_salt is not None:
        body["cache_salt"] = cache_salt
    return _encode(body)


@dataclass(frozen=True)
class PrefillReply:
    """What a prefill engine answered to a leg or to a probe."""

    status: int
    params: dict[str, Any] | None = None
    """The hand-off parameters it offers; None when there are none, as with legs sent at once."""
    complete: bool = False
    """Whether it ended because its one token was there. What ends otherwise hands nothing over."""


def prefill_reply(status: int, payload: bytes) -> PrefillReply:
    """The answer of `/v1/completions` or of `/disagg/v1/probe`."""
    if status != 200:
        return PrefillReply(status)
    body = json_object(payload)
    ended = body
    choices = body.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        ended = choices[0]
    return PrefillReply(status, transfer_params(body), ended.get("finish_reason") == "length")


def json_object(payload: bytes) -> dict[str, Any]:
    """An engine's JSON object; empty when it is none."""
    try:
        decoded = _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return decoded if isinstance(decoded, dict) else {}


def is_server_fault(event: bytes) -> bool:
    """True for an SSE error event whose code is a 5xx: the engine's fault, so that another one may answer."""
    try:
        code = _decode(event.removeprefix(b"data: ").split(b"\n", 1)[0])["error"]["code"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return False
    return isinstance(code, int) and code >= 500


def transfer_params(response: Mapping[str, Any]) -> dict[str, Any] | None:
    """The hand-off parameters of a prefill leg's response, or None when it offers none."""
    params = response.get("kv_transfer_params")
    if not isinstance(params, dict) or not params.get(DO_REMOTE_PREFILL) or not params.get("remote_block_ids"):
        return None
    return params
