# SPDX-License-Identifier: Apache-2.0
"""What of a request goes on, and what is refused, without a socket."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.requests import Request

from disagg.errors import InvalidRequestError, ModelNotFoundError
from disagg.gateway.front.fields import FORBIDDEN_FIELDS
from disagg.gateway.front.intake import (
    check_fields,
    check_parts,
    check_prompts,
    forwarded_headers,
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
        ["no message", None, 1, {}, {"content": 5}, {"content": "text of many characters"}],
        "no list",
        None,
    ],
)
def test_as_many_parts(messages: Any) -> None:
    """Messages, their content parts and their tool calls count together."""
    check_parts({"messages": messages, "tools": [1, 2], "functions": "none"}, max_parts=8, max_tools=2)


@pytest.mark.parametrize("messages", [[message()] * 9, [message(8)], [message(0, 8)], [message(4), message(0, 3)]])
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
