# SPDX-License-Identifier: Apache-2.0
"""Refusals that name a flag of vLLM's name the setting, too: the words, and every way that a refusal takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg.gateway.front.flags import in_answer, in_first_chunk, with_settings
from pools.engine.base import Receive, Scope, Send
from tests.support.gateway_stack import Hook, Stack, running_stack

KNOWN = frozenset({"enable_auto_tool_choice", "tool_call_parser", "max_logprobs", "chat_template", "seed"})
TOOLS = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
SETTINGS = " (here: args.model.engine_kwargs.enable_auto_tool_choice, args.model.engine_kwargs.tool_call_parser)"


def error(message: Any) -> bytes:
    return json.dumps({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}).encode()


@pytest.mark.parametrize(
    ("message", "added"),
    [
        (TOOLS, SETTINGS),
        ("Set max_logprobs (--max-logprobs) to at least 30.", " (here: args.model.engine_kwargs.max_logprobs)"),
        ("Pass a `--chat-template`, or --chat-template X.", " (here: args.model.engine_kwargs.chat_template)"),
        ("a flag that no config may set: --api-key", ""),
        ("no flags: ---seed, a--seed, -- seed, --Seed, --seeds", ""),
        ("", ""),
    ],
)
def test_the_settings_follow_the_message(message: str, added: str) -> None:
    """Each known flag once, in the order of the message; others, and what only looks like a flag, add nothing."""
    assert with_settings(message, KNOWN) == message + added


def test_an_error_answer_keeps_all_else() -> None:
    """Type, code and further fields stay, and so does an answer that names no setting, byte by byte."""
    told = json.loads(in_answer(error(TOOLS), KNOWN))
    assert told == {"error": {**json.loads(error(TOOLS))["error"], "message": TOOLS + SETTINGS}}
    assert in_answer(error(TOOLS), ()) == error(TOOLS)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"502 --seed",
        b'{"error": {"message": "--seed"',
        b'{"error": "--seed"}',
        b'{"detail": "--seed"}',
        b'["--seed"]',
        b'"--seed \xff"',
        error(["--seed"]),
    ],
)
def test_what_is_no_error_of_openai_stays_as_it_is(payload: bytes) -> None:
    """Answers of any other shape, or cut ones, pass untouched."""
    assert in_answer(payload, KNOWN) == payload
    event = b'data: {"error"' + payload
    assert in_first_chunk(event, KNOWN) == event


def test_only_an_error_event_is_looked_at() -> None:
    """The first chunk of an answer passes untouched whatever text it has; in an error event only the message grows."""
    chunk = b'data: {"choices":[{"text":"--seed"}]}\n\n'
    assert in_first_chunk(chunk, KNOWN) == chunk
    assert in_first_chunk(b"data: " + error(TOOLS) + b"\n\ndata: [DONE]\n\n", KNOWN) == (
        b"data: " + in_answer(error(TOOLS), KNOWN) + b"\n\ndata: [DONE]\n\n"
    )


def refuses(status: int, content_type: bytes, body: bytes) -> Hook:
    """Answer every request so."""

    async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
        headers = [(b"content-type", content_type)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return True

    return hook


async def refused(stack: Stack, path: str, **fields: Any) -> bytes:
    """The body of the answer to a request that the engine refuses."""
    return (await stack.call("POST", path, {"model": "tiny", "prompt": "a", "messages": [], **fields})).body


async def test_every_way_that_a_refusal_takes() -> None:
    """A whole answer, one passed on, and an error event at the begin of a stream; answers without error stay."""
    async with running_stack(engine_arguments=KNOWN) as stack:
        [decode] = stack.decode
        told = in_answer(error(TOOLS), KNOWN)
        decode.engine.hook = refuses(400, b"application/json", error(TOOLS))
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
            assert await refused(stack, path) == told, path
        events = b"data: " + error(TOOLS) + b"\n\ndata: [DONE]\n\n"
        decode.engine.hook = refuses(200, b"text/event-stream", events)
        assert b"data: " + told in await refused(stack, "/v1/completions", stream=True)
        decode.engine.hook = refuses(200, b"application/json", error(TOOLS))
        assert await refused(stack, "/v1/completions") == error(TOOLS)
