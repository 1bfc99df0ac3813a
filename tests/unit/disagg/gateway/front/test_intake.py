# SPDX-License-Identifier: Apache-2.0
"""What of a request goes on, and what is refused, without a socket."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from starlette.requests import Request

from disagg.config import GatewayConfig
from disagg.errors import InvalidRequestError, ModelNotFoundError
from disagg.gateway.front.fields import FORBIDDEN_FIELDS
from disagg.gateway.front.intake import (
    check_body,
    check_fields,
    check_kinds,
    check_lists,
    check_parts,
    check_prompts,
    forwarded_headers,
    json_texts,
    request_id_of,
    take_store,
)
from transport.handoff_params import DO_REMOTE_PREFILL


def request(headers: dict[str, str]) -> Request:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw})


@pytest.mark.parametrize("field", FORBIDDEN_FIELDS)
def test_forbidden_fields(field: str) -> None:
    """Fields of the gateway are refused with any value, in the body and where vLLM merges extra arguments."""
    for value in (None, {}, "x", {DO_REMOTE_PREFILL: True}):
        with pytest.raises(InvalidRequestError) as caught:
            check_fields({"model": "m", field: value}, model_id="m")
        assert caught.value.param == field
        with pytest.raises(InvalidRequestError) as caught:
            check_fields({"model": "m", "vllm_xargs": {field: value}}, model_id="m")
        assert caught.value.param == f"vllm_xargs.{field}"


def test_model_field() -> None:
    """The one model passes; absent, another and no text are told apart."""
    check_fields({"model": "m", "vllm_xargs": {"other": 1}, "messages": []}, model_id="m")
    check_fields({"model": "m", "vllm_xargs": [*FORBIDDEN_FIELDS]}, model_id="m")
    for value in (None, 5, ["m"], {"m": 1}, True):
        with pytest.raises(InvalidRequestError) as caught:
            check_fields({"model": value}, model_id="m")
        assert caught.value.param == "model"
    for name in ("", "M", "m ", "other"):
        with pytest.raises(ModelNotFoundError):
            check_fields({"model": name}, model_id="m")


def test_request_ids() -> None:
    """A plain token is kept, anything else replaced by a new one each time."""
    for good in ("a", "req-1.2_3:4", "A" * 128):
        assert request_id_of(request({"x-request-id": good})) == good
    for bad in ("", "a b", "a/b", "a\r\nb", "é", "a" * 129, "a\n"):
        first, second = (request_id_of(request({"x-request-id": bad})) for _ in range(2))
        assert first != second and len(first) == 32 and first.isalnum()


def test_forwarded_headers() -> None:
    """Trace context goes on when it is short ASCII; nothing else does."""
    trace = {"traceparent": "00-a-b-01", "tracestate": "x=y"}
    assert forwarded_headers(request({**trace, "authorization": "x", "x-data-parallel-rank": "1"})) == trace
    assert forwarded_headers(request({"traceparent": "x" * 513, "tracestate": "é"})) == {}


def test_store_is_taken_out() -> None:
    """What the client says about storing leaves the body and its bytes; without it the bytes stay the same object."""
    raw = b'{ "model": "m", "n": 1 }'
    assert take_store({"model": "m", "n": 1}, raw) == (None, raw)
    assert take_store({"model": "m"}, raw)[1] is raw
    body: dict[str, Any] = {"model": "m", "disagg_store": "never", "prompt": "é"}
    store, left = take_store(body, b"...")
    assert (store, json.loads(left), body) == ("never", {"model": "m", "prompt": "é"}, {"model": "m", "prompt": "é"})
    for value in (None, "Always", "", 1, True, ["never"], {}):
        with pytest.raises(InvalidRequestError) as caught:
            take_store({"disagg_store": value}, b"")
        assert caught.value.param == "disagg_store"


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [1, 2, 3, 4], "a text of many characters", [], None])
def test_as_many_prompts(prompt: Any) -> None:
    """A text, a list of token ids and as many prompts as the limit pass."""
    check_prompts({"prompt": prompt}, 2)
    check_prompts({}, 2)


@pytest.mark.parametrize("prompt", [["a", "b", "c"], [[1], [2], [3]]])
def test_too_many_prompts(prompt: Any) -> None:
    """One more is refused."""
    with pytest.raises(InvalidRequestError, match="3 prompts, this server takes 2") as caught:
        check_prompts({"prompt": prompt}, 2)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    "prompt",
    [
        [7, 7, "x"],
        ["x", 7],
        [7, [7]],
        [7, None],
        [7, 1.5],
        [7, -1],
        [7, 2**32],
        [None],
        [{}],
        [[7], ["x"]],
        [["x", "y"]],
        [[7, "x"]],
        [[[7]]],
        [7] * 1000 + ["x"],
    ],
    ids=repr,
)
def test_prompts_of_a_kind(prompt: list[Any]) -> None:
    """A list of prompts is texts, ids, or lists of ids; one thing of another kind among them is refused."""
    with pytest.raises(InvalidRequestError, match="prompt must be a text, a list of texts") as caught:
        check_prompts({"prompt": prompt}, 8)
    assert caught.value.param == "prompt"


def test_lists_of_token_ids_are_free() -> None:
    """Where token ids belong there may be any number of them, and nothing else."""
    ids = [0, 2**32 - 1] * 500
    check_lists({"prompt": ids, "tokens": ids, "allowed_token_ids": ids}, 4)
    for name in ("tokens", "allowed_token_ids"):
        for other in ("7", -1, 1.0, None, [7]):
            with pytest.raises(InvalidRequestError, match=f"{name} must be a list of token ids") as caught:
                check_lists({name: [*ids, other]}, 4)
            assert caught.value.param == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ["a"] * 4),
        ("bad_words", ["a"] * 4),
        ("stop_token_ids", [7] * 4),
        ("logit_bias", {str(i): 1 for i in range(4)}),
        ("vllm_xargs", {"a": ["b", "c"], "d": 1}),
        ("structured_outputs", {"choice": ["a", "b", "c"]}),
        ("documents", [{"text": "a"}, {"text": "b"}]),
        ("tokens", {str(i): 1 for i in range(4)}),
        ("unknown", [[1], [2]]),
    ],
)
def test_entries_of_other_lists_and_objects(field: str, value: Any) -> None:
    """As many as the limit pass; one more is refused, in the field itself or right in what it holds."""
    check_lists({field: value, "messages": [{}] * 9, "tools": [{}] * 9, "user": "a" * 9}, 4)
    with pytest.raises(InvalidRequestError, match=f"{field} has more than 3 .*gateway.max_field_entries") as caught:
        check_lists({field: value}, 3)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{}, 5]}, "messages"),
        ({"messages": [None]}, "messages"),
        ({"messages": [{"role": "user"}, {"role": 5}]}, "messages[1].role"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["a", {}, 5]}]}, "messages[0].content"),
        ({"messages": [{"tool_calls": [{}, "a"]}]}, "messages[0].tool_calls"),
        ({"messages": [{"tools": [[]]}]}, "messages[0].tools"),
        ({"tools": [{}, "f"]}, "tools"),
        ({"functions": [1]}, "functions"),
    ],
    ids=repr,
)
def test_lists_of_a_chat_hold_objects(body: dict[str, Any], param: str) -> None:
    """Anything else among them is named, before vLLM holds each entry against all of its shapes."""
    with pytest.raises(InvalidRequestError, match=f"^{re.escape(param)} must be a ") as caught:
        check_kinds(body)
    assert caught.value.param == param


def test_what_vllm_has_to_judge_of_a_chat() -> None:
    """Objects of any keys, texts among parts, and fields that are no lists."""
    message = {"role": "user", "content": ["a", {"type": "unknown"}, {}], "tool_calls": None, "tools": 5}
    check_kinds({"messages": [message, {"role": "x", "content": None}], "tools": [{}], "functions": "f"})
    check_kinds({"messages": "a", "tools": 5})


def test_texts_that_are_parsed_as_json() -> None:
    """Arguments of tool calls, and what an answer has to look like where it is text."""
    called = {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}, {"function": {"name": "f"}}, 1]}
    body = {"messages": [called, {}, None], "structured_outputs": {"json": "[]", "structural_tag": {}, "regex": "["}}
    assert list(json_texts(body)) == ["{}", "[]"]
    for other in ({}, {"messages": "a", "structured_outputs": "b"}, {"messages": [{"tool_calls": {}}]}):
        assert list(json_texts(other)) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[" * 1000 + "]" * 1000, "nested 1000 levels deep"),
        ("[" + "1," * 600_000 + "1]", "more than 500000 values"),
        ("]" * 1000 + "[" * 101, "closes more"),
    ],
    ids=["deep", "many", "no JSON"],
)
async def test_json_in_texts_has_the_bounds_of_a_body(text: str, fault: str) -> None:
    """vLLM's parser ends in a RecursionError, which would cost one replica after the other."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
    chat = {"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]}
    for body in (chat, {"model": "m", "prompt": "a", "structured_outputs": {"json": text}}):
        with pytest.raises(InvalidRequestError, match=f"JSON text in the request body .*{fault}"):
            await check_body(body, GatewayConfig(), model_id="m")
    call["function"] = {"name": "f", "arguments": '{"a": "' + "[" * 1000 + '"}'}
    await check_body(chat, GatewayConfig(), model_id="m")


def message(num_parts: int = 0, num_calls: int = 0) -> dict[str, Any]:
    part, call = {"type": "text", "text": "a"}, {"id": "c", "type": "function", "function": {"name": "f"}}
    return {"role": "user", "content": [part] * num_parts or "a", "tool_calls": [call] * num_calls}


@pytest.mark.parametrize(
    "messages",
    [
        [message()] * 8,
        [message(7)],
        [message(0, 7)],
        [message(2), message(0, 2), message(), message()],
        [{"role": "developer", "content": "a", "tools": [{}] * 7}],
        ["no message", None, 1, {}, {"content": 5}, {"content": "text of many characters"}],
        "no list",
        None,
    ],
)
def test_as_many_parts(messages: Any) -> None:
    """Messages, their content parts and their tool calls count together."""
    check_parts({"messages": messages, "tools": [1, 2], "functions": "none"}, max_parts=8, max_tools=2)


@pytest.mark.parametrize("messages", [[message()] * 9, [message(8)], [message(0, 8)], [{"tools": [{}] * 8}]])
def test_too_many_parts(messages: Any) -> None:
    """One more is refused, before anything validates them."""
    with pytest.raises(InvalidRequestError, match="more than 8 .*gateway.max_chat_parts") as caught:
        check_parts({"messages": messages}, max_parts=8, max_tools=2)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("field", ["tools", "functions"])
def test_too_many_tools(field: str) -> None:
    """By their old name, too."""
    with pytest.raises(InvalidRequestError, match=f"3 {field}, this server takes 2") as caught:
        check_parts({field: [{}] * 3}, max_parts=8, max_tools=2)
    assert caught.value.param == field
