# SPDX-License-Identifier: Apache-2.0
"""What requests rule out, whatever the replicas are like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import pytest

from disagg.routing.constraints import (
    MAX_PRIMED_PROMPTS,
    errand,
    pair_only,
    resumed,
    ruled_out,
    view_of,
)
from disagg.routing.constraints import (
    alone as sent_alone,
)
from disagg.routing.views import Endpoint, Mode, RequestView

ONE = [[1, 2, 3]]

Case: TypeAlias = tuple[Endpoint, dict[str, Any], list[list[int]] | None, Mapping[Mode, str]]


def alone(reason: str) -> Mapping[Mode, str]:
    return {"handoff": reason, "primed": reason}


CASES: dict[str, Case] = {
    "plain completion": ("completions", {}, ONE, {}),
    "plain chat": ("chat", {}, ONE, {}),
    "streamed, stopped, sampled": ("chat", {"stream": True, "stop": ["x"], "temperature": 1}, ONE, {}),
    "logprobs of the answer": ("completions", {"logprobs": 3}, ONE, {}),
    "chat logprobs": ("chat", {"logprobs": True, "top_logprobs": 2}, ONE, {}),
    "echo": ("completions", {"echo": True}, ONE, {}),
    "tools": ("chat", {"tools": [{}], "tool_choice": "auto"}, ONE, {}),
    "min_tokens": ("completions", {"min_tokens": 5}, ONE, {}),
    "n is one": ("chat", {"n": 1, "best_of": 1}, ONE, {}),
    "n is null": ("chat", {"n": None, "best_of": None}, ONE, {}),
    "not rendered": ("completions", {}, None, alone("not_rendered")),
    "no prompts": ("completions", {}, [], alone("empty_prompt")),
    "empty prompt": ("completions", {}, [[]], alone("empty_prompt")),
    "one of two empty": ("completions", {}, [[1], []], alone("empty_prompt")),
    "prompt logprobs": ("chat", {"prompt_logprobs": 0}, ONE, alone("prompt_logprobs")),
    "echo with logprobs": ("completions", {"echo": True, "logprobs": 0}, ONE, alone("prompt_logprobs")),
    "echo in chat is no echo": ("chat", {"echo": True, "logprobs": True}, ONE, {}),
    "beam search": ("completions", {"use_beam_search": True, "n": 4}, ONE, alone("beam_search")),
    "several choices": ("completions", {"n": 2}, ONE, {"handoff": "n"}),
    "best of several": ("completions", {"best_of": 3}, ONE, {"handoff": "n"}),
    "n as text": ("completions", {"n": "2"}, ONE, {"handoff": "n"}),
    "n as a float": ("completions", {"n": 2.0}, ONE, {"handoff": "n"}),
    "two prompts": ("completions", {}, [[1], [2]], {"handoff": "prompt_list"}),
    "many prompts": ("completions", {}, [[1]] * MAX_PRIMED_PROMPTS, {"handoff": "prompt_list"}),
    "too many prompts": ("completions", {}, [[1]] * (MAX_PRIMED_PROMPTS + 1), alone("prompt_list")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_a_request_rules_out(case: Case) -> None:
    """Each kind of request gets its KV the way it can, and the others are ruled out with the word for why."""
    endpoint, body, prompts, expected = case
    assert ruled_out(endpoint, body, prompts, min_handoff_tokens=1) == expected


def test_short_prompts_stay_on_decode() -> None:
    """Below the limit the decode engine prefills itself, at the limit it does not; the longest prompt counts."""
    assert ruled_out("chat", {}, [[1] * 9], min_handoff_tokens=10) == alone("short")
    assert ruled_out("chat", {}, [[1] * 10], min_handoff_tokens=10) == {}
    assert ruled_out("completions", {}, [[1], [1] * 10], min_handoff_tokens=10) == {"handoff": "prompt_list"}
    assert ruled_out("chat", {}, ONE, min_handoff_tokens=0) == {}


def test_the_view_of_a_request() -> None:
    """It has the prompt and the salt, nothing that was tried, and needs room where decode computes it."""
    view = view_of("chat", {"cache_salt": "s"}, ONE, b"{}", min_handoff_tokens=1)
    assert view == RequestView("chat", ONE, 3, {}, "s", frozenset(), None, None, True)
    unrendered = view_of("completions", {}, None, b"x" * 100, min_handoff_tokens=1, max_model_len=7)
    assert (unrendered.num_tokens, unrendered.ruled_out) == (7, alone("not_rendered"))


def test_what_was_tried_narrows_a_view() -> None:
    """Each way on keeps what was ruled out before and adds its own."""
    view = view_of("completions", {"n": 2}, ONE, b"", min_handoff_tokens=1)
    local = sent_alone(view, "decode_lost", ["d0"])
    assert (local.ruled_out, local.without) == (alone("decode_lost"), {"d0"})
    assert sent_alone(local, "decode_error", ["d1"]).without == {"d0", "d1"}
    other = pair_only(view, ["p0"])
    assert (other.ruled_out, other.without) == ({"handoff": "n", "local": "pair_only", "prefill": "pair_only"}, {"p0"})
    assert pair_only(other, ["p1"]).without == {"p0", "p1"}
    going_on = resumed(view, "fit")
    assert (going_on.kv_fit, going_on.needs_room, going_on.ruled_out["primed"]) == ("fit", False, "resumed")
    assert going_on.ruled_out["handoff"] == "n" and "local" not in going_on.ruled_out


def test_errands() -> None:
    """They go to decode alone, and need room only where they bring a prompt."""
    assert errand().ruled_out.keys() == {"handoff", "primed"}
    assert (errand().needs_room, errand(num_tokens=5, decode_id="d0").needs_room) == (False, True)
    assert errand(num_tokens=5, decode_id="d0").decode_id == "d0"
