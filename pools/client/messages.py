# SPDX-License-Identifier: Apache-2.0
"""What a replica and its client say to each other as JSON, beside the OpenAI API.

Both sides use these types, and the two may be of different versions during a rolling update: fields that a type does
not know are ignored, and a field that comes to a type later has a default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import msgspec

from pools.client.request_fields import on_both_legs
from pools.client.routes import CHAT_COMPLETIONS
from pools.engine.base import EngineStats, KVTransferParams
from pools.engine.events import Event
from transport.handoff_params import DO_REMOTE_PREFILL

# Requests


class Abort(msgspec.Struct):
    """Body of `POST abort`: stop the request that carried this `X-Request-Id`."""

    request_id: str


class Settle(msgspec.Struct):
    """Body of `POST settle`: nobody will consume these hand-offs."""

    handoff_ids: list[str]


class Probe(msgspec.Struct):
    """Body of `POST probe`: run one token through the engine."""

    prompt_token_ids: list[int]
    kv_transfer_params: KVTransferParams | None = None
    cache_salt: str | None = None
    """Whose caches it uses and fills, as in a request."""
    priority: int = 0
    """Its place in the engine's queue, as in a request."""
    session_id: str | None = None
    """As in a request."""


# Answers


class Aborted(msgspec.Struct):
    """Answer of `POST abort`."""

    aborted: bool
    """Whether the request was running."""


class Settled(msgspec.Struct):
    """Answer of `POST settle`."""

    settled: int
    """Number of ids that the engine took."""


class PrefixCacheReset(msgspec.Struct):
    """Answer of `POST reset_prefix_cache`."""

    reset: bool
    """False while blocks are in use; nothing is forgotten then."""


class Probed(msgspec.Struct):
    """Answer of `POST probe`."""

    num_cached_tokens: int
    """Prompt tokens that were not computed by this engine for this request: prefix cache or KV transfer."""
    kv_transfer_params: KVTransferParams | None = None
    """Hand-off parameters, when the probe asked for a remote decode."""
    finish_reason: str | None = None
    num_cached_before: int = 0
    """Those of the cached tokens that no KV transfer has brought."""


class Events(msgspec.Struct, omit_defaults=True):
    """Answer of `GET events`."""

    incarnation: str
    next: int
    """`after` of the next read."""
    lost: int
    """Events between `after` and the first of these that were dropped before they were read."""
    events: list[Event]
    """As the engine tells them, see `pools.engine.events`; the client reads them as `pools.client.events`."""
    draining: bool = False
    """Whether the replica leaves."""


class ReplicaHealth(msgspec.Struct):
    """Answer of `GET health`: what the replica's process knows of its engine."""

    incarnation: str
    state: str
    """`ok`, `suspect` or `draining`."""
    reason: str | None = None
    """Why it is suspect."""
    since_s: float = 0.0
    """How long it has been in that state, in seconds."""
    probe_s: float | None = None
    """How long the engine took for the last token that it was asked for without other work; None before the first."""
    num_probes: int = 0
    """How many of these it has answered."""


@dataclass(frozen=True)
class ReplicaStats(EngineStats):
    """Answer of `GET stats`: the engine's statistics and what the replica's server counts beside them."""

    engine_id: str = field(default="", kw_only=True)
    role: str = field(default="", kw_only=True)
    incarnation: str = field(default="", kw_only=True)
    pid: int | None = field(default=None, kw_only=True)
    """The process that owns the engine."""
    num_requests_in_flight: int = field(default=0, kw_only=True)
    """Requests that reached the OpenAI app and are not finished."""
    connections_closed: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    """Connections closed for what they sent or did not send, by reason."""
    num_connections_closed_total: int = field(default=0, kw_only=True)
    uptime_s: float = field(default=0.0, kw_only=True)
    """Seconds since the server was made."""

    told: frozenset[str] = field(default=frozenset(), kw_only=True)
    """Names of the fields that came from the replica; one of an earlier version tells fewer. Not on the wire."""

    @classmethod
    def of(cls, engine: EngineStats, **own: Any) -> Self:
        """An engine's statistics, and fields of this class."""
        return cls.from_told({**engine.as_dict(), **own})

    @classmethod
    def from_told(cls, told: Mapping[str, Any]) -> Self:
        """From the fields on the wire. Raises ValueError."""
        known = frozenset(told) & _STATS_FIELDS
        return msgspec.convert({**{name: told[name] for name in known}, "told": known}, cls, strict=False)

    def as_dict(self) -> dict[str, Any]:
        """The fields on the wire."""
        return {name: getattr(self, name) for name in sorted(self.told)}


_STATS_FIELDS = frozenset(known.name for known in fields(ReplicaStats)) - {"told"}


class Error(msgspec.Struct):
    """Why something was refused, in OpenAI's shape."""

    message: str
    type: str
    code: int
    param: str | None = None


class ErrorAnswer(msgspec.Struct):
    """Body of every answer that is none of the above."""

    error: Error


# The OpenAI API: what the two legs of a request send. Source of the rules: vLLM 0.32, its transfer protocols and routes


_encode = msgspec.json.Encoder().encode


def prefill_body(
    model: str,
    prompt_token_ids: Sequence[int],
    kv_transfer_params: Mapping[str, Any],
    *,
    asked: Mapping[str, Any],
) -> bytes:
    """The prefill leg: the same prompt, one token, and of the request only what `request_fields` says.

    Everything that could end it early, repeat it or make it cost more is left out, so that its KV is always offered.

    Args:
        asked: the client's body.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt_token_ids),
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "kv_transfer_params": kv_transfer_params,
        **on_both_legs(asked),
    }
    return _encode(body)


def decode_body(
    path: str,
    body: Mapping[str, Any],
    prompt_token_ids: Sequence[int],
    kv_transfer_params: Mapping[str, Any],
) -> bytes:
    """The decode leg of a hand-off: the client's request, the tokens already made of it, and where its KV is.

    `echo` and `suffix` need the prompt's text, so there the prompt stays as the client sent it.

    Args:
        path: the route that the client asked.
    """
    sent = dict(body)
    if path == CHAT_COMPLETIONS:
        sent["kv_transfer_params"] = {**kv_transfer_params, "prompt_token_ids": list(prompt_token_ids)}
    else:
        sent["kv_transfer_params"] = dict(kv_transfer_params)
        if not body.get("echo") and body.get("suffix") is None:
            sent["prompt"] = list(prompt_token_ids)
    return _encode(sent)


# The OpenAI API: its answers, as far as a client has to understand them


@dataclass(frozen=True)
class PrefillReply:
    """What a prefill engine answered to a leg or to a probe."""

    status: int
    params: KVTransferParams | None = None
    """The hand-off parameters it offers; None when there are none, as with legs sent at once."""
    complete: bool = False
    """Whether it ended because its one token was there. What ends otherwise hands nothing over."""
    num_cached_tokens: int = 0
    """Prompt tokens that the engine or its tiers held before."""


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _PromptTokensDetails | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    kv_transfer_params: KVTransferParams | None = None


_decode_completion = msgspec.json.Decoder(_Completion).decode
_decode = msgspec.json.Decoder().decode


def prefill_reply(status: int, payload: bytes) -> PrefillReply:
    """A prefill leg's answer. One that cannot be understood offers nothing."""
    if status != 200:
        return PrefillReply(status)
    try:
        answer = _decode_completion(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return PrefillReply(status)
    finish_reason = answer.choices[0].finish_reason if answer.choices else None
    details = answer.usage.prompt_tokens_details if answer.usage else None
    num_cached = (details.cached_tokens if details else None) or 0
    return PrefillReply(status, offered(answer.kv_transfer_params), finish_reason == "length", num_cached)


def offered(params: Any) -> KVTransferParams | None:
    """Hand-off parameters for the decode leg, or None when these offer no KV. Source: vLLM 0.32, NIXL."""
    if not isinstance(params, dict) or not params.get(DO_REMOTE_PREFILL) or not params.get("remote_block_ids"):
        return None
    return params


def is_server_fault(event: bytes) -> bool:
    """True for an SSE error event whose code is a 5xx: the engine's fault, so that another one may answer."""
    try:
        code = _decode(event.removeprefix(b"data: ").split(b"\n", 1)[0])["error"]["code"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return False
    return isinstance(code, int) and code >= 500
