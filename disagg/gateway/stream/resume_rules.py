# SPDX-License-Identifier: Apache-2.0
"""Which streams another replica may resume when their decode replica is lost, and from which token. Pure.

`_FREE` and `_UNSET` are whitelists. If a request has a field that neither of them names, the gateway does not resume
its stream: the stream ends with an error event.
Source of what each field does: vLLM 0.32, `ChatCompletionRequest`, `CompletionRequest`, `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from disagg.gateway.front.fields import Endpoint
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.token_ids import IDS, asking_for_ids

_FREE = frozenset(
    # These make the prompt, and the gateway has the tokens of the prompt already.
    "model messages prompt documents chat_template chat_template_kwargs add_generation_prompt continue_final_message "
    "add_special_tokens reasoning_effort media_io_kwargs mm_processor_kwargs parallel_tool_calls "
    # These look at each token by itself, or at prompt and output alike (repetition_penalty).
    "top_p top_k min_p repetition_penalty logit_bias allowed_token_ids stop_token_ids ignore_eos "
    # How the answer is written.
    "logprobs top_logprobs return_tokens_as_token_ids return_token_ids return_token_offsets skip_special_tokens "
    "spaces_between_special_tokens include_stop_str_in_output stream stream_options stream_interval "
    # Bookkeeping.
    "user cache_salt priority request_id session_id metadata store service_tier prompt_cache_key safety_identifier "
    # `_judged` and `cut_for` look at the values of these.
    "temperature stop max_tokens max_completion_tokens min_tokens tools tool_choice response_format".split()
)
_UNSET: dict[str, tuple[Any, ...]] = {
    "seed": (None,),
    "n": (None, 1),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "structured_outputs": (None,),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "bad_words": (None, []),
    "vllm_xargs": (None, {}),
    "logits_processors": (None, []),
    "echo": (None, False),
    "suffix": (None,),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None,),
    "watermarking": (None, False),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "include_reasoning": (None, True),
    "return_prompt_text": (None, False),
    "routed_experts_prompt_start": (None, 0),
    "prompt_embeds": (None,),
}
"""Fields that rule a resume out, except with these values: what any other value needs is lost with the engine."""

_COUNTS = ("max_tokens", "max_completion_tokens", "min_tokens")


@dataclass(frozen=True)
class ResumePlan:
    """What a request needs so that its stream can outlive the replicas that it comes from."""

    asked: Call
    """As the client sent it."""
    call: Call
    """As it is sent to an engine."""
    refusal: str | None
    """Why no other replica can resume its stream; None when one can."""

    @property
    def client_ids(self) -> bool:
        """Whether the client asked for token ids itself."""
        return self.asked.body.get(IDS) is True


def resume_plan(call: Call) -> ResumePlan:
    """Decide from the request alone."""
    refusal = why_not(call.endpoint, call.body, call.prompts)
    return ResumePlan(call, call if refusal else asking_for_ids(call), refusal)


def why_not(endpoint: Endpoint, body: Mapping[str, Any], prompts: Sequence[Sequence[int]] | None) -> str | None:
    """Why a stream of this request cannot be resumed, in one word or `field:<name>`; None when it can.

    This looks at the request alone. What the client has by the time of the loss can still rule a resume out.

    Args:
        prompts: token ids of each prompt, or None when it could not be rendered.
    """
    if body.get("stream") is not True:
        return "field:stream"
    if prompts is None or len(prompts) != 1 or not prompts[0]:
        return "not_rendered" if prompts is None else "several_prompts"
    for name, value in body.items():
        if name in _UNSET:
            # 0 == False and 1 == True here as in vLLM.
            if value not in _UNSET[name]:
                return f"field:{name}"
        elif name not in _FREE:
            return f"field:{name}"
    return _judged(endpoint, body)


def _judged(endpoint: Endpoint, body: Mapping[str, Any]) -> str | None:
    for name in _COUNTS:
        # vLLM takes "8" and 8.0 too; counting on from those is not worth it.
        if type(body.get(name, 0)) is not int and body[name] is not None:
            return f"field:{name}"
    if not isinstance(body.get("temperature"), int | float | None):
        return "field:temperature"
    response_format = body.get("response_format")
    if response_format is not None and response_format != {"type": "text"}:
        return "field:response_format"
    if body.get("tool_choice") not in (None, "none", "auto"):
        return "field:tool_choice"
    stops = stop_strings(body)
    if stops is None or (stops and not is_greedy(body)):
        return "field:stop"
    return None


def stop_strings(body: Mapping[str, Any]) -> list[str] | None:
    """The request's stop strings; None when they are of no shape that vLLM takes."""
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    return stops if isinstance(stops, list) and all(isinstance(item, str) for item in stops) else None


def is_greedy(body: Mapping[str, Any]) -> bool:
    """Whether the tokens follow from the prompt. An unset temperature does not count: it means the model's default."""
    return body.get("temperature") == 0


@dataclass(frozen=True)
class Cut:
    """Where the next replica takes over."""

    num_tokens: int
    """Tokens of the answer that the next replica gets as part of its prompt."""
    overlap: str
    """Text behind these tokens that the client has. The next replica makes it again, and must make it alike."""


def cut_for(body: Mapping[str, Any], texts: Sequence[str], sent_text: str, *, client_ids: bool) -> Cut | str:
    """The cut of a stream that was lost, or why it has none.

    Args:
        texts: for each token that the lost engine told, the text it added; empty where the engine held the text
            back (an incomplete character) or the token has none.
        sent_text: what the client has.
        client_ids: whether the client asked for token ids, and so has them of all tokens.
    """
    stops = stop_strings(body) or []
    longest = max(map(len, stops), default=0)
    if body.get("tools") and body.get("tool_choice") != "none":
        # What a tool parser holds back may be the beginning of a call.
        held = longest - 1 if longest and not body.get("include_stop_str_in_output") else 0
        said = "".join(texts)
        if sent_text != said[: max(0, len(said) - held)]:
            return "tool_parser"
    # A stop string may begin in what was sent; the new engine looks for it only in what it makes itself.
    limit = max(0, len(sent_text) - longest)
    num_tokens = end = offset = 0
    for i, text in enumerate(texts):
        if not sent_text.startswith(text, offset) or offset + len(text) > limit:
            break
        offset += len(text)
        if text:
            num_tokens, end = i + 1, offset
    overlap = sent_text[end:]
    if overlap and not is_greedy(body):
        return "held_back"
    if num_tokens < len(texts):
        # The next replica makes the tokens behind the cut again. The client keeps what it was told of the old ones.
        if _has_logprobs(body):
            return "logprobs"
        if client_ids and not is_greedy(body):
            return "token_ids"
    return Cut(num_tokens, overlap)


def _has_logprobs(body: Mapping[str, Any]) -> bool:
    """In a completion, 0 asks for the log-probability of each token itself; vLLM takes false as 0."""
    value = body.get("logprobs")
    return bool(value) if "messages" in body else value is not None
