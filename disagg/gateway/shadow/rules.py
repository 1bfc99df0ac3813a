# SPDX-License-Identifier: Apache-2.0
"""Which answers can be checked by computing them again, what is sent for it, and how two answers are compared. Pure.

The gateway checks only greedy answers whose tokens follow from the prompt alone. The second run is always a plain
completion of the prompt's tokens. It does not end by itself, so that it has a token for each token of the answer, also
for the last one.
Source of what each field does: vLLM 0.32, `ChatCompletionRequest`, `CompletionRequest`, `SamplingParams`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from transport.handoff_params import NOT_STORED

NEAR_TIE = 0.5
"""If the log-probabilities of two tokens are no further apart than this, in nats, either token may win: the order in
which an engine adds up numbers depends on what else it computes at the moment."""
_NUM_TOP = 5
_FREE = frozenset(
    # These make the prompt, and the gateway has the tokens of the prompt already.
    "model messages prompt documents chat_template chat_template_kwargs add_generation_prompt continue_final_message "
    "add_special_tokens reasoning_effort include_reasoning "
    # These do not change which token is the best.
    "temperature seed top_p top_k min_p "
    # Where the answer ends.
    "max_tokens max_completion_tokens stop stop_token_ids ignore_eos include_stop_str_in_output "
    # How the answer is written.
    "stream stream_options stream_interval logprobs top_logprobs return_tokens_as_token_ids return_token_ids "
    "return_token_offsets skip_special_tokens spaces_between_special_tokens "
    # Bookkeeping.
    "user cache_salt priority request_id session_id metadata store service_tier prompt_cache_key "
    "safety_identifier".split()
)
_ONE = frozenset(("n", "best_of", "repetition_penalty", "length_penalty"))
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_NOTHING: tuple[Any, ...] = (None, 0, [], {})

_encode = msgspec.json.Encoder().encode


def may_check(body: Mapping[str, Any], prompts: Sequence[Sequence[int]] | None) -> bool:
    """Whether another run of a request must give the same tokens.

    Args:
        prompts: token ids of each prompt, or None when it could not be rendered.
    """
    temperature = body.get("temperature")
    if temperature is None or isinstance(temperature, str) or temperature != 0:
        # An unset temperature means the model's default.
        return False
    if prompts is None or len(prompts) != 1 or not prompts[0] or body.get("stream") not in (None, False, True):
        return False
    return all(name in _FREE or _says_nothing(name, value) for name, value in body.items())


def _says_nothing(name: str, value: Any) -> bool:
    return value in _NOTHING or (name in _ONE and value == 1)


def shadow_body(
    model: str, prompt_token_ids: Sequence[int], num_tokens: int, *, asked: Mapping[str, Any], cache_salt: str
) -> bytes:
    """The body of the second run: `num_tokens` tokens after the prompt. With a new `cache_salt` no tier has its KV.

    `asked` is the client's body. If it sets a penalty to nothing, so does the second run, because the model's default
    holds for an unset penalty.
    """
    return _encode(
        {name: asked[name] for name in _PENALTIES if asked.get(name) is not None}
        | {
            "model": model,
            "prompt": prompt_token_ids,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": _NUM_TOP,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "cache_salt": cache_salt,
            # No later request has this salt, so nobody would load the KV.
            "kv_transfer_params": NOT_STORED,
        }
    )


class _Logprobs(msgspec.Struct):
    top_logprobs: list[dict[str, float] | None] = []


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Document(msgspec.Struct):
    choices: list[_Choice] = []


_decode = msgspec.json.Decoder(_Document).decode


@dataclass(frozen=True)
class Computed:
    """What an engine made of a prompt."""

    token_ids: Sequence[int]
    top_logprobs: Sequence[Mapping[str, float] | None] = ()
    """For each token the best ones at its place, as `token_id:<id>`, in nats; empty if the engine told none."""


def computed(payload: bytes) -> Computed | None:
    """The first choice of an answer that is not streamed; None when it tells no token ids or did not end well."""
    try:
        choices = _decode(payload).choices
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not choices or not choices[0].token_ids or choices[0].finish_reason not in ("stop", "length"):
        return None
    logprobs = choices[0].logprobs
    return Computed(choices[0].token_ids, logprobs.top_logprobs if logprobs else ())


@dataclass(frozen=True)
class Difference:
    """The first place where two answers part. The tokens behind this place follow from it and are not compared."""

    position: int
    answered: int
    """Id of the client's token."""
    computed: int
    """Id of the second run's token; -1 if it has none there."""
    top_logprobs: Mapping[str, float]
    """The second run's best tokens at this place, see `Computed`; empty if the engine told none."""

    @property
    def is_tie(self) -> bool:
        """Whether the second run might have chosen the client's token as well."""
        best = self.top_logprobs.get(f"token_id:{self.computed}", math.inf)
        return best - self.top_logprobs.get(f"token_id:{self.answered}", -math.inf) <= NEAR_TIE


def difference(answered: Sequence[int], again: Computed) -> Difference | None:
    """Where `again` parts from the tokens of an answer; None when `again` begins with all of `answered`."""
    for i, token in enumerate(answered):
        if i >= len(again.token_ids) or again.token_ids[i] != token:
            other = again.token_ids[i] if i < len(again.token_ids) else -1
            top = again.top_logprobs[i] if i < len(again.top_logprobs) else None
            return Difference(i, token, other, top or {})
    return None
