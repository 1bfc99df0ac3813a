# SPDX-License-Identifier: Apache-2.0
"""Which streams go on, from which token, and the request that does it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg.gateway.front.fields import Endpoint
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.token_ids import asking_for_ids
from disagg.gateway.stream.resume_body import continued, num_left
from disagg.gateway.stream.resume_rules import Cut, cut_for, is_greedy, why_not

BODY: dict[str, Any] = {"model": "m", "stream": True, "temperature": 0}

TABLE: list[tuple[str, dict[str, Any], str | None]] = [
    ("greedy", {}, None),
    ("sampling", {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, None),
    ("repetition_penalty counts the prompt too", {"repetition_penalty": 1.2}, None),
    ("stop strings, greedy", {"stop": ["a", "b"], "stop_token_ids": [3]}, None),
    ("stop strings, sampling", {"temperature": 1, "stop": ["a"]}, "field:stop"),
    ("stop strings, the model's temperature", {"temperature": None, "stop": "a"}, "field:stop"),
    ("stop of another shape", {"stop": [1]}, "field:stop"),
    ("logprobs", {"logprobs": 1}, None),
    ("limits", {"max_tokens": 5, "min_tokens": 2, "ignore_eos": True}, None),
    ("a limit of another shape", {"max_tokens": "5"}, "field:max_tokens"),
    ("null says nothing", {"seed": None, "n": None, "response_format": None, "max_tokens": None}, None),
    ("plain text", {"response_format": {"type": "text"}}, None),
    ("JSON", {"response_format": {"type": "json_object"}}, "field:response_format"),
    ("structured outputs", {"structured_outputs": {"regex": "a"}}, "field:structured_outputs"),
    ("guided", {"guided_json": {}}, "field:guided_json"),
    ("seed", {"seed": 0}, "field:seed"),
    ("n", {"n": 2}, "field:n"),
    ("best_of", {"best_of": 2}, "field:best_of"),
    ("beam search", {"use_beam_search": True}, "field:use_beam_search"),
    ("presence_penalty", {"presence_penalty": 0.1}, "field:presence_penalty"),
    ("frequency_penalty", {"frequency_penalty": -1}, "field:frequency_penalty"),
    ("no penalty", {"frequency_penalty": 0.0, "presence_penalty": 0}, None),
    ("bad_words", {"bad_words": ["a"]}, "field:bad_words"),
    ("vllm_xargs", {"vllm_xargs": {"a": 1}}, "field:vllm_xargs"),
    ("logits processors", {"logits_processors": ["a"]}, "field:logits_processors"),
    ("echo", {"echo": True}, "field:echo"),
    ("suffix", {"suffix": "a"}, "field:suffix"),
    ("prompt_logprobs", {"prompt_logprobs": 0}, "field:prompt_logprobs"),
    ("tools offered", {"tools": [{}], "tool_choice": "auto"}, None),
    ("tools forced", {"tools": [{}], "tool_choice": "required"}, "field:tool_choice"),
    ("hidden reasoning", {"include_reasoning": False}, "field:include_reasoning"),
    ("stream spelt otherwise", {"stream": 1}, "field:stream"),
    ("not streamed", {"stream": False}, "field:stream"),
    ("unknown", {"new_in_vllm": 1}, "field:new_in_vllm"),
]


@pytest.mark.parametrize(("fields", "reason"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_rules(fields: dict[str, Any], reason: str | None) -> None:
    """Each field that needs state of the lost engine rules a resume out by its name; so does any unknown one."""
    for endpoint in ("chat", "completions"):
        assert why_not(endpoint, {**BODY, **fields}, [[1, 2]]) == reason  # type: ignore[arg-type]


def test_rules_of_prompts() -> None:
    """One prompt, whose tokens are known."""
    assert why_not("completions", BODY, None) == "not_rendered"
    assert why_not("completions", BODY, [[1], [2]]) == "several_prompts"
    assert why_not("completions", BODY, [[]]) == "several_prompts"
    assert is_greedy({"temperature": 0.0}) and not is_greedy({}) and not is_greedy({"temperature": 1e-6})


STOPS = {"temperature": 0, "stop": ["abc"]}
TOOLS = {"temperature": 0, "tools": [{}]}
CUTS: list[tuple[str, dict[str, Any], list[str], str, Cut | str]] = [
    ("all of it", {}, ["a", "b"], "ab", Cut(2, "")),
    ("nothing sent yet", {}, ["", ""], "", Cut(0, "")),
    ("half a character waits", {}, ["a", "é", ""], "aé", Cut(2, "")),
    ("a character of three tokens", {}, ["a", "", "", "語"], "a語", Cut(4, "")),
    ("text that was not told of, greedy", {}, ["a", "b"], "abc", Cut(2, "c")),
    ("text that was not told of, sampling", {"temperature": 1}, ["a", "b"], "abc", "held_back"),
    ("half a character, sampling", {"temperature": 1}, ["a", ""], "a", Cut(1, "")),
    ("a stop string may span the seam", STOPS, ["xy", "z", "ab"], "xyz", Cut(0, "xyz")),
    ("far enough from it", STOPS, ["x", "y", "z", "1", "2", "3"], "xyz1", Cut(1, "yz1")),
    ("told at once", {**STOPS, "include_stop_str_in_output": True}, ["x", "yzab"], "xyzab", Cut(1, "yzab")),
    ("log-probabilities, all tokens kept", {"logprobs": 1}, ["a", "b"], "ab", Cut(2, "")),
    ("log-probabilities, half a character", {"logprobs": 1}, ["a", ""], "a", "logprobs"),
    ("log-probabilities off", {"logprobs": False, "messages": []}, ["a", ""], "a", Cut(1, "")),
    ("log-probabilities of no others", {"logprobs": 0}, ["a", ""], "a", "logprobs"),
    ("the same, as vLLM reads it", {"logprobs": False}, ["a", ""], "a", "logprobs"),
    ("tools, text only", TOOLS, ["a", "b"], "ab", Cut(2, "")),
    ("tools, the parser holds something back", TOOLS, ["a", "<to"], "a", "tool_parser"),
    ("tools that are not to be called", {**TOOLS, "tool_choice": "none"}, ["a", "<to"], "a", Cut(1, "")),
    ("tools and stop strings", {**TOOLS, "stop": ["abc"]}, ["wwww", "x", "y"], "wwww", Cut(0, "wwww")),
    ("a parser left tokens out", {}, ["<think>", "a"], "a", Cut(0, "a")),
]


@pytest.mark.parametrize(("body", "texts", "sent", "expected"), [row[1:] for row in CUTS], ids=[row[0] for row in CUTS])
def test_cut(body: dict[str, Any], texts: list[str], sent: str, expected: Cut | str) -> None:
    """The most tokens whose text was sent; what lies behind them is to come again, or the stream ends."""
    assert cut_for({"temperature": 0, **body}, texts, sent, client_ids=False) == expected


def test_cut_with_token_ids_at_the_client() -> None:
    """Ids that the client has cannot be sampled again."""
    assert cut_for({"temperature": 0}, ["a", ""], "a", client_ids=True) == Cut(1, "")
    assert cut_for({"temperature": 1}, ["a", ""], "a", client_ids=True) == "token_ids"
    assert cut_for({"temperature": 1}, ["a", "b"], "ab", client_ids=True) == Cut(2, "")


def call(endpoint: Endpoint, **fields: Any) -> Call:
    body = {**BODY, **({"messages": []} if endpoint == "chat" else {"prompt": "text"}), **fields}
    return Call(endpoint, body, json.dumps(body).encode(), [[1, 2, 3]], "id")


def test_asking_for_ids() -> None:
    """The field goes in front of the client's bytes; one that it sent itself is overruled."""
    plain = call("chat")
    asked = asking_for_ids(plain)
    assert asked.raw == b'{"return_token_ids":true,' + plain.raw[1:] and asked.body["return_token_ids"] is True
    for value in (False, None):
        raw = asking_for_ids(call("chat", return_token_ids=value)).raw
        assert raw.count(b"return_token_ids") == 1 and json.loads(raw)["return_token_ids"] is True
    own = call("chat", return_token_ids=True)
    assert asking_for_ids(own) is own


@pytest.mark.parametrize(
    ("endpoint", "fields", "left"),
    [
        ("completions", {}, 14),
        ("completions", {"max_tokens": None}, 14),
        ("completions", {"max_tokens": 5}, 3),
        ("chat", {}, None),
        ("chat", {"max_tokens": 5}, 3),
        ("chat", {"max_tokens": 9, "max_completion_tokens": 5}, 3),
    ],
)
def test_continued(endpoint: Endpoint, fields: dict[str, Any], left: int | None) -> None:
    """Prompt and tokens go as one prompt, and the limits count on."""
    first = call(endpoint, min_tokens=4, cache_salt="s", **fields)
    again = continued(first, [7, 8])
    assert num_left(first, 2) == left == num_left(again, 0)
    assert again.prompts == [[1, 2, 3, 7, 8]] and again.body["min_tokens"] == 2
    assert continued(first, [7] * 5 if left is None else [7]).body["min_tokens"] == (0 if left is None else 3)
    sent = json.loads(again.raw)
    assert sent["cache_salt"] == "s"
    if endpoint == "chat":
        assert sent["kv_transfer_params"] == {"prompt_token_ids": [1, 2, 3, 7, 8]}
        assert "kv_transfer_params" not in again.body
    else:
        assert sent["prompt"] == [1, 2, 3, 7, 8] and sent["max_tokens"] == left
