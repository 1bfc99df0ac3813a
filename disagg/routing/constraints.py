# SPDX-License-Identifier: Apache-2.0
"""What a request itself rules out, whatever the replicas are like. Pure.

Source of the rules: vLLM 0.32, the NIXL pull protocol and the OpenAI routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from disagg.routing.views import Endpoint, Mode, RequestView

MAX_PRIMED_PROMPTS = 8
"""A longer list of prompts is prefilled on decode: more legs at once would starve other requests."""

_BYTES_PER_TOKEN = 4
"""A rough mean over languages and tokenisers, for requests that could not be tokenised."""

NOTHING: Mapping[Mode, str] = MappingProxyType({})


def _fans_out(reason: str) -> Mapping[Mode, str]:
    return MappingProxyType({"handoff": reason})


def _alone(reason: str) -> Mapping[Mode, str]:
    return MappingProxyType({"handoff": reason, "primed": reason})


_NOT_RENDERED = _alone("not_rendered")
_EMPTY_PROMPT = _alone("empty_prompt")
_PROMPT_LOGPROBS = _alone("prompt_logprobs")
_BEAM_SEARCH = _alone("beam_search")
_SHORT = _alone("short")
_LONG_LIST = _alone("prompt_list")
_PROMPT_LIST = _fans_out("prompt_list")
_SEVERAL_CHOICES = _fans_out("n")


def view_of(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    prompts: Sequence[Sequence[int]] | None,
    raw: bytes,
    *,
    min_handoff_tokens: int,
    max_model_len: int | None = None,
) -> RequestView:
    """A request that nobody has tried to answer yet.

    Args:
        prompts: token ids of each prompt, or None when the request could not be rendered (decode then says why).
        raw: the body in bytes; its length stands for the prompt's where there are no `prompts`.
        max_model_len: tokens that the model can take, when known.
    """
    return RequestView(
        endpoint,
        prompts,
        num_prompt_tokens(prompts, raw, max_model_len=max_model_len),
        ruled_out(endpoint, body, prompts, min_handoff_tokens=min_handoff_tokens),
        body.get("cache_salt"),
    )


def errand(without: frozenset[str] = frozenset(), *, num_tokens: int = 0, decode_id: str | None = None) -> RequestView:
    """A request of the gateway itself to a decode replica alone: to tokenise a text, or to compute an answer again.

    Args:
        num_tokens: prompt tokens that the decode replica computes and must have room for; 0 for none.
        decode_id: the only decode replica that will do; None when any will.
    """
    return RequestView(
        "completions", None, num_tokens, _ERRAND, without=without, decode_id=decode_id, needs_room=num_tokens > 0
    )


def alone(request: RequestView, reason: str, without: Iterable[str] = ()) -> RequestView:
    """The request for a decode replica alone, and for none of `without`, because its hand-off failed (`reason`)."""
    return replace(request, ruled_out=_alone(reason), without=request.without.union(without))


def resumed(request: RequestView, kv_fit: str) -> RequestView:
    """The request as it goes on with a broken stream: on a decode replica of the same `kv_fit`.

    The decode replica needs no room, because the request was let in before. The mode `primed` is ruled out, because the
    stream is one answer.
    """
    rules = MappingProxyType({"primed": "resumed", **request.ruled_out})
    return replace(request, ruled_out=rules, kv_fit=kv_fit, needs_room=False)


def pair_only(request: RequestView, without: Iterable[str] = ()) -> RequestView:
    """The request for a pair without any replica of `without`. The caller decides what happens when there is none."""
    rules = MappingProxyType({"local": "pair_only", "prefill": "pair_only", **request.ruled_out})
    return replace(request, ruled_out=rules, without=request.without.union(without))


def ruled_out(
    endpoint: Endpoint, body: Mapping[str, Any], prompts: Sequence[Sequence[int]] | None, *, min_handoff_tokens: int
) -> Mapping[Mode, str]:
    """The modes that the request cannot have, each with one of a few fixed words for why.

    A `handoff` is for one prompt with one answer. `primed` serves several from the same KV. `local` and `prefill` are
    never ruled out: an engine of either pool answers every request as an aggregated engine would.
    """
    if prompts is None:
        return _NOT_RENDERED
    if not prompts or any(not ids for ids in prompts):
        return _EMPTY_PROMPT
    if body.get("prompt_logprobs") is not None:
        return _PROMPT_LOGPROBS
    if endpoint == "completions" and body.get("echo") and body.get("logprobs") is not None:
        return _PROMPT_LOGPROBS
    if body.get("use_beam_search"):
        return _BEAM_SEARCH
    if max(map(len, prompts)) < min_handoff_tokens:
        return _SHORT
    if len(prompts) > 1:
        return _PROMPT_LIST if len(prompts) <= MAX_PRIMED_PROMPTS else _LONG_LIST
    if _count(body.get("n")) > 1 or _count(body.get("best_of")) > 1:
        return _SEVERAL_CHOICES
    return NOTHING


def num_prompt_tokens(prompts: Sequence[Sequence[int]] | None, raw: bytes, *, max_model_len: int | None = None) -> int:
    """Tokens that a request makes a decode engine compute; estimated from its body when it could not be rendered.

    Args:
        max_model_len: tokens that the model can take, when known. A larger estimate is wrong, as for images.
    """
    if prompts is not None:
        return sum(map(len, prompts))
    estimate = len(raw) // _BYTES_PER_TOKEN
    return estimate if max_model_len is None else min(estimate, max_model_len)


def _count(value: Any) -> int:
    """A count as vLLM may read it. vLLM turns "2" and 2.0 into 2, so any value that is no int counts as several."""
    if value is None:
        return 1
    return value if isinstance(value, int) else 2


_ERRAND: Mapping[Mode, str] = MappingProxyType({"handoff": "errand", "primed": "errand"})
