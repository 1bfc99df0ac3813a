# SPDX-License-Identifier: Apache-2.0
"""The request set that both topologies answer, and what makes two answers the same.

Lengths run from 1 to 3,500 tokens, over chat and completions, streamed and not, with every parameter that the gateway
treats in a special way. All of it is deterministic, so that a reference can be recorded once.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

LOGPROB_TOLERANCE = 0.05
"""bfloat16 sums differ in the last place with the shape of the batch; a wrong token differs by far more."""


@dataclass(frozen=True)
class Case:
    """One request of the set."""

    name: str
    path: str
    body: dict[str, Any]


def cases() -> list[Case]:
    """The whole set, at least 150 requests, always the same."""
    return list(_completions()) + list(_chats()) + list(_special())


def _words(number: int, seed: int) -> str:
    chooser = random.Random(seed)
    vocabulary = (
        "river stone cloud engine paper lamp seven north garden quiet signal copper window letter march".split()
    )
    return " ".join(chooser.choice(vocabulary) for _ in range(number))


def _ids(number: int, seed: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(20, 1500) for _ in range(number)]


_LENGTHS = (1, 2, 3, 7, 15, 31, 64, 100, 127, 128, 129, 200, 255, 256, 257, 384, 500, 513, 777, 1000, 1280, 1500)
_LONG = (2000, 2047, 2048, 2049, 2500, 3000, 3333, 3500)


def _completions() -> Iterator[Case]:
    for stream in (False, True):
        for length in (*_LENGTHS, *_LONG):
            body = {
                "model": "tiny",
                "prompt": _ids(length, length),
                "max_tokens": 24,
                "temperature": 0,
                "stream": stream,
                "return_token_ids": True,
            }
            yield Case(f"completion of {length} ids{', streamed' if stream else ''}", "/v1/completions", body)


def _chats() -> Iterator[Case]:
    for stream in (False, True):
        for number in (1, 5, 20, 60, 90, 120, 200, 300, 450, 600, 900, 1200):
            body = {
                "model": "tiny",
                "messages": [
                    {"role": "system", "content": "You are terse."},
                    {"role": "user", "content": _words(number, number)},
                ],
                "max_tokens": 24,
                "temperature": 0,
                "stream": stream,
                "return_token_ids": True,
            }
            yield Case(f"chat of {number} words{', streamed' if stream else ''}", "/v1/chat/completions", body)


_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_COLOUR = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}, "level": {"type": "integer"}},
    "required": ["colour", "level"],
    "additionalProperties": False,
}

_BOTH: tuple[tuple[str, dict[str, Any]], ...] = (
    ("n of 2", {"n": 2, "temperature": 0.5, "seed": 3}),
    ("n of 3, sampled", {"n": 3, "temperature": 0.8, "seed": 11}),
    ("stop string", {"stop": ["e"]}),
    ("stop strings, kept", {"stop": ["a", "o"], "include_stop_str_in_output": True}),
    ("min_tokens", {"min_tokens": 10, "stop": ["e"]}),
    ("seed", {"seed": 7, "temperature": 1.0}),
    ("seed and top_p", {"seed": 8, "temperature": 0.9, "top_p": 0.7}),
    ("penalties", {"frequency_penalty": 1.0, "presence_penalty": 0.5}),
    ("logit_bias", {"logit_bias": {"100": 20}}),
    ("one token", {"max_tokens": 1}),
    ("long answer", {"max_tokens": 120, "ignore_eos": True}),
    ("usage in stream", {"stream_options": {"include_usage": True}, "stream": True}),
    (
        "usage in every chunk",
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "stream": True},
    ),
    ("cache_salt", {"cache_salt": "tenant-a"}),
    ("truncated prompt", {"truncate_prompt_tokens": 100}),
)
_CHAT_ONLY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("logprobs", {"logprobs": True, "top_logprobs": 3}),
    ("tools, none chosen", {"tools": [_WEATHER], "tool_choice": "none"}),
    ("tools, auto", {"tools": [_WEATHER], "tool_choice": "auto"}),
    ("tool by name", {"tools": [_WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}),
    ("json_object", {"response_format": {"type": "json_object"}, "max_tokens": 40}),
    (
        "json_schema",
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "colour", "schema": _COLOUR}},
            "max_tokens": 40,
        },
    ),
    ("max_completion_tokens", {"max_completion_tokens": 9}),
    ("user and metadata", {"user": "somebody"}),
)
_COMPLETION_ONLY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("logprobs", {"logprobs": 3}),
    ("echo", {"echo": True}),
    ("echo with logprobs", {"echo": True, "logprobs": 2}),
    ("prompt_logprobs", {"prompt_logprobs": 2, "stream": False}),
    ("list of one string", {"prompt": [_words(60, 77)]}),
    ("list of strings", {"prompt": [_words(60, 1), _words(150, 2), "x"]}),
    ("list of ids", {"prompt": [_ids(40, 3), _ids(300, 4)]}),
    ("list with n", {"prompt": [_words(30, 5), _words(200, 6)], "n": 2, "temperature": 0.7, "seed": 5}),
    ("list with echo", {"prompt": [_words(30, 8), _words(10, 9)], "echo": True}),
    ("json_schema", {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": _COLOUR}}}),
)


def _special() -> Iterator[Case]:
    for stream in (False, True):
        suffix = ", streamed" if stream else ""
        for name, extra in (*_BOTH, *_CHAT_ONLY):
            if extra.get("stream", stream) is not stream:
                continue
            messages = [{"role": "user", "content": _words(90, 42)}]
            body = {"model": "tiny", "messages": messages, "max_tokens": 24, "temperature": 0, "stream": stream}
            yield Case(f"chat: {name}{suffix}", "/v1/chat/completions", _with(body, extra))
        for name, extra in (*_BOTH, *_COMPLETION_ONLY):
            if extra.get("stream", stream) is not stream:
                continue
            body = {
                "model": "tiny",
                "prompt": _words(90, 43),
                "max_tokens": 24,
                "temperature": 0,
                "stream": stream,
            }
            yield Case(f"completion: {name}{suffix}", "/v1/completions", _with(body, extra))


def _with(body: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = {**body, **extra}
    if "max_completion_tokens" in merged:
        merged.pop("max_tokens")
    return {**merged, "return_token_ids": True}


@dataclass
class Answer:
    """One answer, streamed or not, in one form."""

    status: int
    choices: list[dict[str, Any]]
    usage: dict[str, Any] | None
    headers: dict[str, str]
    error: Any = None

    def as_json(self) -> dict[str, Any]:
        return {"status": self.status, "choices": self.choices, "usage": self.usage, "error": self.error}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Answer:
        return cls(value["status"], value["choices"], value["usage"], {}, value["error"])


async def ask(client: httpx.AsyncClient, url: str, case: Case) -> Answer:
    """Send one request and put its answer into one form."""
    if not case.body.get("stream"):
        response = await client.post(url + case.path, json=case.body)
        value = response.json()
        if response.status_code != 200:
            return Answer(response.status_code, [], None, dict(response.headers), value)
        return Answer(200, [_choice(c) for c in value["choices"]], _usage(value["usage"]), dict(response.headers))
    async with client.stream("POST", url + case.path, json=case.body) as response:
        if response.status_code != 200:
            return Answer(response.status_code, [], None, dict(response.headers), json.loads(await response.aread()))
        events = []
        done = False
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
        if not done:
            return Answer(200, [], None, dict(response.headers), "the stream has no [DONE]")
        return _joined(events, dict(response.headers))


def _joined(events: Sequence[dict[str, Any]], headers: dict[str, str]) -> Answer:
    by_index: dict[int, dict[str, Any]] = {}
    usage = None
    for event in events:
        if "error" in event:
            return Answer(200, [], None, headers, event)
        usage = event.get("usage") or usage
        for piece in event["choices"]:
            choice = by_index.setdefault(
                piece["index"],
                {
                    "index": piece["index"],
                    "text": "",
                    "tool_calls": {},
                    "token_ids": [],
                    "finish": None,
                    "logprobs": [],
                },
            )
            delta = piece.get("delta") or {}
            choice["text"] += piece.get("text") or delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                known = choice["tool_calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                function = call.get("function") or {}
                known["name"] += function.get("name") or ""
                known["arguments"] += function.get("arguments") or ""
            choice["token_ids"] += piece.get("token_ids") or []
            choice["finish"] = piece.get("finish_reason") or choice["finish"]
            choice["logprobs"] += _logprobs(piece.get("logprobs"))
    choices = [by_index[i] for i in sorted(by_index)]
    for choice in choices:
        choice["tool_calls"] = [choice["tool_calls"][i] for i in sorted(choice["tool_calls"])]
    return Answer(200, choices, _usage(usage), headers)


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message") or {}
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return {
        "index": choice["index"],
        "text": choice.get("text") or message.get("content") or "",
        "tool_calls": [{"name": call["name"], "arguments": call["arguments"]} for call in calls],
        "token_ids": choice.get("token_ids") or [],
        "finish": choice["finish_reason"],
        "logprobs": _logprobs(choice.get("logprobs")),
    }


def _logprobs(value: dict[str, Any] | None) -> list[list[Any]]:
    """`[token, logprob]` of each position, for both APIs."""
    if not value:
        return []
    if value.get("content") is not None:
        return [[item["token"], item["logprob"]] for item in value["content"]]
    return [list(pair) for pair in zip(value.get("tokens") or (), value.get("token_logprobs") or (), strict=True)]


def _usage(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens", "total_tokens")}


def difference(expected: Answer, got: Answer) -> str | None:
    """What differs between two answers, or None."""
    if expected.error or got.error:
        return None if expected.error and expected.status == got.status else f"error {got.error} for {expected.error}"
    if expected.status != got.status:
        return f"status {got.status} for {expected.status}"
    if expected.usage != got.usage:
        return f"usage {got.usage} for {expected.usage}"
    if len(expected.choices) != len(got.choices):
        return f"{len(got.choices)} choices for {len(expected.choices)}"
    for one, other in zip(expected.choices, got.choices, strict=True):
        for key in ("index", "token_ids", "text", "tool_calls", "finish"):
            if one[key] != other[key]:
                return f"choice {one['index']}: {key} {other[key]!r} for {one[key]!r}"
        if (problem := _logprob_difference(one["logprobs"], other["logprobs"])) is not None:
            return f"choice {one['index']}: {problem}"
    return None


def _logprob_difference(expected: list[list[Any]], got: list[list[Any]]) -> str | None:
    if [item[0] for item in expected] != [item[0] for item in got]:
        return "logprobs name other tokens"
    for (token, one), (_, other) in zip(expected, got, strict=True):
        if (one is None) != (other is None) or (one is not None and abs(one - other) > LOGPROB_TOLERANCE):
            return f"logprob of {token!r} is {other} for {one}"
    return None


async def ask_all(url: str, chosen: Sequence[Case], *, num_clients: int) -> list[Answer]:
    """The answers to all cases, in order, by `num_clients` clients at once."""
    answers: list[Answer | None] = [None] * len(chosen)
    todo = iter(range(len(chosen)))
    limits = httpx.Limits(max_connections=num_clients, max_keepalive_connections=num_clients)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:

        async def work() -> None:
            for i in todo:
                answers[i] = await ask(client, url, chosen[i])

        await asyncio.gather(*(work() for _ in range(num_clients)))
    return [answer for answer in answers if answer is not None]
