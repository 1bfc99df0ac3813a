# SPDX-License-Identifier: Apache-2.0
"""From bytes to a checked body, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from disagg.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from disagg.gateway.front.fields import FORBIDDEN_FIELDS
from disagg.gateway.front.intake import (
    check_fields,
    check_prompts,
    forwarded_headers,
    parse_json,
    read_body,
    request_id_of,
    take_store,
)
from transport.handoff_params import DO_REMOTE_PREFILL


def request(headers: dict[str, str] | None = None, parts: Sequence[bytes | None] = ()) -> Request:
    """A request whose body comes in `parts`; None is a client that leaves. After them nothing comes."""
    waiting = list(parts)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.Event().wait()
        part = waiting.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(waiting) or part == b"..."}

    raw = [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


async def read(given: Request, max_bytes: int = 10) -> bytes:
    return await read_body(given, max_bytes=max_bytes, timeout_s=0.02)


async def test_body_in_parts() -> None:
    """Parts are joined up to the limit itself."""
    assert await read(request(parts=[b"abcde", b"", b"fghij"])) == b"abcdefghij"
    assert await read(request(parts=[b""])) == b""


async def test_body_too_large() -> None:
    """Both a declared and a real size over the limit are refused; a wrong declaration does not help."""
    for given in (
        request({"content-length": "11"}),
        request(parts=[b"abcdef", b"ghijkl"]),
        request({"content-length": "1"}, [b"x" * 11]),
        request({"content-length": "eleven"}, [b"x" * 11]),
        request({"content-length": "-1"}, [b"x" * 11]),
    ):
        with pytest.raises(BodyTooLargeError, match="10 bytes"):
            await read(given)


async def test_body_that_does_not_come() -> None:
    """A silent client is refused after the limit, one that leaves is told apart."""
    with pytest.raises(RequestTimeoutError, match=r"0\.02 s"):
        await read(request(parts=[b"..."]))
    with pytest.raises(ClientDisconnect):
        await read(request(parts=[b"...", None]))


@pytest.mark.parametrize(
    "content_type",
    [None, "", "application/json", "application/json;charset=utf-8", "APPLICATION/JSON", "application/problem+json"],
)
def test_json_types(content_type: str | None) -> None:
    """JSON under any of its names, or under none."""
    headers = {} if content_type is None else {"content-type": content_type}
    assert parse_json(request(headers), b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("content_type", ["text/plain", "text/json", "application/jsonp", "; charset=utf-8", "json"])
def test_other_types(content_type: str) -> None:
    """Anything else is told so."""
    with pytest.raises(UnsupportedMediaTypeError):
        parse_json(request({"content-type": content_type}), b"{}")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"1", b'"x"', b"{} {}", b'{"a": NaN}', b"\xff{}", b"[" * 100_000, b'{"a":' * 100_000],
    ids=["empty", "open", "list", "null", "number", "text", "two", "NaN", "no UTF-8", "deep list", "deep object"],
)
def test_no_json_object(raw: bytes) -> None:
    """Whatever is no JSON object is the client's fault."""
    with pytest.raises(InvalidRequestError):
        parse_json(request(), raw)


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
