# SPDX-License-Identifier: Apache-2.0
"""Where each field of a completion request goes when its prompt is handed off: to which leg, and why.

A prefill leg computes the prompt's KV and one token that nobody reads. So it gets what changes that KV, or its place in
the engine's queue or books, and nothing else. Source: the request models of vLLM 0.32, `entrypoints/openai`. A test
compares the names with those of the installed vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

Legs = Literal["both", "tokens", "decode", "alone", "none"]
"""`both`: each leg carries the field. `tokens`: the gateway has used it to make the token ids that both legs carry.
`decode`: only the decode leg carries it. `alone`: a request that uses it is not handed off; a decode replica gets it as
it came. `none`: no engine sees the client's value."""


@dataclass(frozen=True)
class Field:
    """One field of a request."""

    legs: Legs
    why: str


_SAMPLING = Field("decode", "chooses tokens of the answer; the prefill leg's one token is not read")
_ENDING = Field("decode", "ends the answer; the prefill leg ends after one token")
_SHAPE = Field("decode", "shapes what is written, not what is computed")
_PARSING = Field("decode", "constrains or parses the answer")
_TEMPLATE = Field("tokens", "the chat template and the tokeniser have used it")
_MEDIA = Field("alone", "media change KV in ways that token ids do not tell")

FIELDS: Mapping[str, Field] = {
    # Scheduling and accounting
    "priority": Field("both", "place in each engine's queue, with scheduling_policy: priority"),
    "session_id": Field("both", "vLLM puts it into the KV events of each engine"),
    "cache_salt": Field("both", "whose caches the KV is found in and put into; the gateway sets it for tenants"),
    "user": Field("decode", "vLLM does not use it"),
    "request_id": Field("decode", "each leg has an id of its own in X-Request-Id, which vLLM prefers"),
    # What the prompt is made of
    "model": Field("both", "the model that both pools serve"),
    "messages": _TEMPLATE,
    "prompt": _TEMPLATE,
    "tools": Field("tokens", "in the template; decode gets them, too, to parse calls"),
    "tool_choice": Field("tokens", "may take tools out of the template; decode gets it, too"),
    "documents": _TEMPLATE,
    "reasoning_effort": _TEMPLATE,
    "add_generation_prompt": _TEMPLATE,
    "continue_final_message": _TEMPLATE,
    "add_special_tokens": _TEMPLATE,
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "truncate_prompt_tokens": _TEMPLATE,
    "truncation_side": _TEMPLATE,
    "suffix": Field("tokens", "decode gets the prompt as it came, because it makes the text of both again"),
    "echo": Field("tokens", "decode gets the prompt as it came, because it writes its text"),
    "media_io_kwargs": _MEDIA,
    "mm_processor_kwargs": _MEDIA,
    "prompt_embeds": Field("alone", "there are no token ids"),
    # What the decode engine has to compute of the prompt
    "prompt_logprobs": Field("alone", "the logits of the prompt come of computing it where they are read"),
    "use_beam_search": Field("alone", "its beams are requests of their own, which would take the hand-off once each"),
    # The answer
    "n": Field("decode", "several answers of one prompt; the hand-off primes decode's prefix cache first"),
    "frequency_penalty": _SAMPLING,
    "presence_penalty": _SAMPLING,
    "repetition_penalty": _SAMPLING,
    "length_penalty": _SAMPLING,
    "logit_bias": _SAMPLING,
    "temperature": _SAMPLING,
    "top_p": _SAMPLING,
    "top_k": _SAMPLING,
    "min_p": _SAMPLING,
    "seed": _SAMPLING,
    "watermarking": _SAMPLING,
    "allowed_token_ids": _SAMPLING,
    "bad_words": _SAMPLING,
    "vllm_xargs": Field("decode", "arguments of logits processors; those that move KV are refused"),
    "max_tokens": _ENDING,
    "max_completion_tokens": _ENDING,
    "min_tokens": _ENDING,
    "stop": _ENDING,
    "stop_token_ids": _ENDING,
    "ignore_eos": _ENDING,
    "thinking_token_budget": _ENDING,
    "repetition_detection": _ENDING,
    "response_format": _PARSING,
    "structured_outputs": _PARSING,
    "parallel_tool_calls": _PARSING,
    "include_reasoning": _PARSING,
    "logprobs": _SHAPE,
    "top_logprobs": _SHAPE,
    "logprob_token_ids": _SHAPE,
    "stream": _SHAPE,
    "stream_options": _SHAPE,
    "stream_interval": _SHAPE,
    "include_stop_str_in_output": _SHAPE,
    "skip_special_tokens": _SHAPE,
    "spaces_between_special_tokens": _SHAPE,
    "return_tokens_as_token_ids": _SHAPE,
    "return_token_ids": _SHAPE,
    "return_token_offsets": _SHAPE,
    "return_prompt_text": _SHAPE,
    "routed_experts_prompt_start": _SHAPE,
    "mm_payload": _SHAPE,
    "return_mm_kwargs": _SHAPE,
    # Ours
    "kv_transfer_params": Field("none", "the gateway's own; refused from clients"),
    "ec_transfer_params": Field("none", "refused from clients: it names other hosts"),
}
"""By name. A field that is not here goes to the decode leg."""

CHAT_ONLY = frozenset(
    "messages tools tool_choice documents reasoning_effort add_generation_prompt continue_final_message chat_template "
    "chat_template_kwargs media_io_kwargs mm_processor_kwargs max_completion_tokens parallel_tool_calls "
    "include_reasoning top_logprobs return_prompt_text".split()
)
COMPLETIONS_ONLY = frozenset({"prompt", "prompt_embeds", "suffix"})
"""Fields that vLLM knows in one kind of request only."""

ON_BOTH_LEGS = ("cache_salt", "priority", "session_id")
"""What a leg that computes or moves KV takes from the client's request as it is."""


def on_both_legs(body: Mapping[str, Any]) -> dict[str, Any]:
    """The client's fields that every leg of its request carries."""
    return {name: body[name] for name in ON_BOTH_LEGS if body.get(name) is not None}


def priority_of(body: Mapping[str, Any]) -> int:
    """The client's priority as vLLM reads it. A value that vLLM refuses is 0 here: the decode leg brings it, too."""
    try:
        return msgspec.convert(body.get("priority", 0), int, strict=False)
    except msgspec.ValidationError:
        return 0
