# SPDX-License-Identifier: Apache-2.0
"""Bad requests as plain data: what each is, and the statuses that answer it.

`bad_requests(model)` takes nothing but the model's id, so that the same table runs against the gateway over fake
engines and over real ones. Every answer has OpenAI's error shape and no status is above 499.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transport.handoff_params import DO_REMOTE_PREFILL

JSON_HEADERS = (("content-type", "application/json"),)
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SCALE = "/admin/v1/pools/decode/scale"
MAX_BODY_BYTES = 10 * 1024 * 1024
"""Default of `gateway.max_body_bytes`."""


@dataclass(frozen=True)
class BadRequest:
    """One request as it goes over the wire, and how it may be answered."""

    name: str
    method: str
    path: str
    headers: Sequence[tuple[str, str]]
    body: bytes
    statuses: tuple[int, ...]
    param: str | None = None
    """The `param` of the error, where it is checked."""
    needs_real_engine: bool = False
    """Whether only vLLM can judge it; the fake engine does not model the field."""
    needs_admin_key: bool = False
    """Whether the right admin key has to be added to the headers."""
    chunk_bytes: int | None = None
    """Send the body chunked, in pieces of so many bytes, without a length."""


def error_fault(status: int, body: bytes) -> str | None:
    """What is wrong with an error answer, or None: `{"error": {"message", "type", "param", "code"}}`, 4xx."""
    if not 400 <= status < 500:
        return f"status {status}"
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"no error object: {body[:200]!r}"
    missing = {"message", "type", "param", "code"} - error.keys()
    if missing:
        return f"no {sorted(missing)} in {error}"
    if not isinstance(error["message"], str) or not error["message"] or not isinstance(error["type"], str):
        return f"message or type is no text in {error}"
    return None


def bad_requests(model: str) -> list[BadRequest]:
    """Every case, each with a name of its own."""
    return [*_bodies(model), *_fields(model), *_generation(model), *_chats(model), *_routes(model), *_admin()]


def _encoded(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def _post(name: str, path: str, body: Any, *statuses: int, **more: Any) -> BadRequest:
    headers = more.pop("headers", JSON_HEADERS)
    return BadRequest(name, "POST", path, headers, _encoded(body), statuses or (400,), **more)


def _good(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": "hi", "max_tokens": 2}


def _good_chat(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def _bodies(model: str) -> list[BadRequest]:
    """What is no JSON object, or does not arrive as one."""
    good = _encoded(_good(model))
    deep = b'{"model": "' + model.encode() + b'", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    large = b'{"model": "' + model.encode() + b'", "prompt": "' + b"x" * (MAX_BODY_BYTES + 1) + b'"}'

    def typed(content_type: str) -> tuple[tuple[str, str], ...]:
        return (("content-type", content_type),)

    return [
        _post("empty body", COMPLETIONS, b""),
        _post("empty chat body", CHAT, b""),
        _post("blank body", COMPLETIONS, b"  \n "),
        _post("malformed JSON", COMPLETIONS, b'{"model": '),
        _post("trailing comma", COMPLETIONS, b'{"model": "x",}'),
        _post("single quotes", CHAT, b"{'model': 'x'}"),
        _post("two documents", COMPLETIONS, good + good),
        _post("array", COMPLETIONS, [1, 2]),
        _post("array of a good request", CHAT, [_good_chat(model)]),
        _post("string", COMPLETIONS, "text"),
        _post("number", COMPLETIONS, 5),
        _post("null", CHAT, b"null"),
        _post("true", CHAT, b"true"),
        _post("empty object", COMPLETIONS, {}, param="model"),
        _post("NaN", COMPLETIONS, good[:-1] + b', "temperature": NaN}'),
        _post("Infinity", COMPLETIONS, good[:-1] + b', "temperature": Infinity}'),
        _post("deep nesting", COMPLETIONS, deep),
        _post("deep nesting in chat", CHAT, b'{"messages": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001),
        _post("invalid UTF-8", COMPLETIONS, good.replace(b"hi", b"\xff\xfe")),
        _post("UTF-16", COMPLETIONS, good.decode().encode("utf-16")),
        _post("byte order mark", COMPLETIONS, b"\xef\xbb\xbf" + good),
        _post("raw newline in a string", COMPLETIONS, good.replace(b"hi", b"h\ni")),
        _post("NUL bytes", COMPLETIONS, b"\x00" * 64),
        _post("compressed without saying so", COMPLETIONS, b"\x1f\x8b\x08\x00" + b"x" * 64),
        _post("plain text type", COMPLETIONS, good, 415, headers=typed("text/plain")),
        _post("form type", COMPLETIONS, b"model=x", 415, headers=typed("application/x-www-form-urlencoded")),
        _post("multipart type", CHAT, b"--a--", 415, headers=typed("multipart/form-data; boundary=a")),
        _post("two content types in one", CHAT, good, 415, headers=typed("text/plain, application/json")),
        _post("duplicate content types", CHAT, good, 400, 415, headers=(*typed("text/plain"), *JSON_HEADERS)),
        _post("nonsense content type", COMPLETIONS, good, 415, headers=typed(";;;===")),
        _post("xml posing as JSON", COMPLETIONS, b"<a/>", headers=typed("application/vnd.x+json")),
        _post("too large by content-length", COMPLETIONS, large, 413),
        _post("too large in chunks", COMPLETIONS, large, 413, chunk_bytes=1 << 20),
        _post("too large chat", CHAT, large, 413),
        _post("malformed in chunks", COMPLETIONS, b'{"model": ', chunk_bytes=3),
    ]


def _fields(model: str) -> list[BadRequest]:
    """What the gateway itself refuses, on every route that takes a body."""
    cases: list[BadRequest] = []
    for name, path, good in (("completion", COMPLETIONS, _good(model)), ("chat", CHAT, _good_chat(model))):
        for field in ("kv_transfer_params", "ec_transfer_params", "kv_hints"):
            cases.append(_post(f"{field} in a {name}", path, good | {field: {"a": 1}}, param=field))
            nested = good | {"vllm_xargs": {field: "x"}}
            cases.append(_post(f"{field} in vllm_xargs of a {name}", path, nested, param=f"vllm_xargs.{field}"))
        attack = {DO_REMOTE_PREFILL: True, "remote_host": "10.0.0.1", "remote_port": 1, "remote_block_ids": [[1]]}
        cases += [
            _post(f"hand-off to another host in a {name}", path, good | {"kv_transfer_params": attack}),
            _post(f"null kv_transfer_params in a {name}", path, good | {"kv_transfer_params": None}),
            _post(
                f"escaped kv_transfer_params in a {name}",
                path,
                _encoded(good)[:-1] + b', "kv_transfer_p\\u0061rams": {}}',
                param="kv_transfer_params",
            ),
            _post(f"{name} without model", path, {k: v for k, v in good.items() if k != "model"}, param="model"),
            _post(f"null model in a {name}", path, good | {"model": None}, param="model"),
            _post(f"number as model in a {name}", path, good | {"model": 5}, param="model"),
            _post(f"list as model in a {name}", path, good | {"model": [model]}, param="model"),
            _post(f"empty model in a {name}", path, good | {"model": ""}, 404, param="model"),
            _post(f"unknown model in a {name}", path, good | {"model": "gpt-4"}, 404, param="model"),
            _post(f"model with a blank in a {name}", path, good | {"model": model + " "}, 404, param="model"),
            _post(f"very long model in a {name}", path, good | {"model": "m" * 100_000}, 404, param="model"),
        ]
    cases += [
        _post("unknown model to tokenize", "/tokenize", {"model": "gpt-4", "prompt": "x"}, 404, param="model"),
        _post("tokenize without model", "/tokenize", {"prompt": "x"}, param="model"),
        _post("malformed tokenize", "/tokenize", b"{"),
        _post("array to detokenize", "/detokenize", []),
        _post("text as tokens", "/detokenize", {"model": model, "tokens": "abc"}),
        _post("negative tokens", "/detokenize", {"model": model, "tokens": [-1]}),
        _post("detokenize without tokens", "/detokenize", {"model": model}),
    ]
    return cases


def _generation(model: str) -> list[BadRequest]:
    """What an engine refuses in a completion. Source: vLLM 0.32 `entrypoints/openai/completion/protocol.py`."""
    good = _good(model)
    real = {"needs_real_engine": True}

    def bad(name: str, fields: dict[str, Any], **more: Any) -> BadRequest:
        return _post(name, COMPLETIONS, good | fields, **more)

    without_prompt = {k: v for k, v in good.items() if k != "prompt"}
    return [
        _post("no prompt", COMPLETIONS, without_prompt),
        bad("null prompt", {"prompt": None}),
        bad("number as prompt", {"prompt": 5}),
        bad("object as prompt", {"prompt": {"a": 1}}),
        bad("empty prompt", {"prompt": ""}),
        bad("empty prompt list", {"prompt": []}),
        bad("empty token prompt", {"prompt": [[]]}),
        bad("negative token id", {"prompt": [-1]}),
        bad("fractional token id", {"prompt": [1.5]}),
        bad("mixed prompt list", {"prompt": ["a", 1]}, param="prompt"),
        bad("text among token ids", {"prompt": [7] * 1000 + ["x"]}, param="prompt"),
        bad("text among allowed token ids", {"allowed_token_ids": [7, "x"]}, param="allowed_token_ids"),
        bad("huge token id", {"prompt": [10**9]}, **real),
        bad("prompt longer than the context", {"prompt": [5] * 300_000}),
        bad("more tokens than the context", {"max_tokens": 10**7}),
        bad("negative max_tokens", {"max_tokens": -1}),
        bad("fractional max_tokens", {"max_tokens": 1.5}),
        bad("text as max_tokens", {"max_tokens": "many"}),
        bad("list as max_tokens", {"max_tokens": [1]}),
        bad("huge integer", {"max_tokens": 10**30}),
        bad("zero n", {"n": 0}),
        bad("negative n", {"n": -1}),
        bad("fractional n", {"n": 1.5}),
        bad("text as stream", {"stream": "maybe"}),
        bad("stream_options without stream", {"stream_options": {"include_usage": True}}),
        bad("text as stream_options", {"stream": True, "stream_options": "usage"}),
        bad("echo as text", {"echo": "perhaps"}),
        bad("negative temperature", {"temperature": -1}, **real),
        bad("temperature above 2", {"temperature": 5}, **real),
        bad("text as temperature", {"temperature": "hot"}, **real),
        bad("zero top_p", {"top_p": 0}, **real),
        bad("top_p above 1", {"top_p": 1.5}, **real),
        bad("top_k below -1", {"top_k": -5}, **real),
        bad("presence_penalty out of range", {"presence_penalty": 9}, **real),
        bad("frequency_penalty out of range", {"frequency_penalty": -3}, **real),
        bad("zero repetition_penalty", {"repetition_penalty": 0}, **real),
        bad("number as stop", {"stop": 5}, **real),
        bad("numbers as stop", {"stop": [1]}, **real),
        bad("logprobs below -1", {"logprobs": -2}, **real),
        bad("text as logprobs", {"logprobs": "a"}, **real),
        bad("too many logprobs", {"logprobs": 10**6}, **real),
        bad("prompt_logprobs while streaming", {"prompt_logprobs": 1, "stream": True}, **real),
        bad("negative min_tokens", {"min_tokens": -1}, **real),
        bad("min_tokens above max_tokens", {"min_tokens": 50, "max_tokens": 10}, **real),
        bad("text as seed", {"seed": "x"}, **real),
        bad("seed beyond 64 bits", {"seed": 2**70}, **real),
        bad("word in logit_bias", {"logit_bias": {"a": 1}}, **real),
        bad("list as logit_bias", {"logit_bias": []}, **real),
        bad("unknown response_format", {"response_format": {"type": "bogus"}}, **real),
        bad("text as response_format", {"response_format": "json"}, **real),
        bad("response_format without schema", {"response_format": {"type": "json_schema"}}, **real),
        bad("empty cache_salt", {"cache_salt": ""}, **real),
        bad("number as cache_salt", {"cache_salt": 5}, **real),
        bad("number as vllm_xargs", {"vllm_xargs": 5}, **real),
        bad("empty bad word", {"bad_words": [""]}, **real),
        bad("number as user", {"user": 5}, **real),
    ]


def _chats(model: str) -> list[BadRequest]:
    """What an engine refuses in a chat. Source: vLLM 0.32 `entrypoints/openai/chat_completion/protocol.py`."""
    good = _good_chat(model)
    real = {"needs_real_engine": True}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    deep = {"name": "f", "arguments": '{"a": ' + "[" * 1000 + "]" * 1000 + "}"}
    called = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": deep}]}

    def bad(name: str, fields: dict[str, Any], **more: Any) -> BadRequest:
        return _post(name, CHAT, good | fields, **more)

    def user(content: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": content}]}

    return [
        _post("no messages", CHAT, {"model": model}),
        bad("null messages", {"messages": None}),
        bad("text as messages", {"messages": "hi"}),
        bad("object as messages", {"messages": {"role": "user"}}),
        bad("empty messages", {"messages": []}),
        bad("number as message", {"messages": [5]}, param="messages"),
        bad("empty message", {"messages": [{}]}, param="messages[0].role"),
        bad("message without role", {"messages": [{"content": "x"}]}, param="messages[0].role"),
        bad("number as role", {"messages": [{"role": 5, "content": "x"}]}, param="messages[0].role"),
        bad("number as content", user(5), param="messages[0].content"),
        bad("number as content part", user([5]), param="messages[0].content"),
        bad("arguments of a tool call nested 1,000 deep", {"messages": [*good["messages"], called]}),
        bad("5,000 stops", {"stop": ["a"] * 5000}, param="stop"),
        bad("unknown content part", user([{"type": "bogus"}]), **real),
        bad("image for a text model", user([{"type": "image_url", "image_url": {"url": "data:,"}}]), **real),
        bad("chat longer than the context", user("word " * 100_000)),
        bad("negative max_tokens in a chat", {"max_tokens": -1}),
        bad("text as max_completion_tokens", {"max_completion_tokens": "many"}),
        bad("zero n in a chat", {"n": 0}),
        bad("text as n in a chat", {"n": "many"}),
        bad("text as stream in a chat", {"stream": "maybe"}),
        bad("stream_options without stream in a chat", {"stream_options": {"include_usage": True}}),
        bad("negative temperature in a chat", {"temperature": -1}, **real),
        bad("top_p out of range in a chat", {"top_p": 7}, **real),
        bad("top_logprobs without logprobs", {"top_logprobs": 3}, **real),
        bad("text as top_logprobs", {"logprobs": True, "top_logprobs": "a"}, **real),
        bad("tool_choice without tools", {"tool_choice": "auto"}, **real),
        bad("empty tools", {"tools": []}, **real),
        bad("number as tools", {"tools": 5}, **real),
        bad("tool without function", {"tools": [{"type": "function"}]}, **real),
        bad("unknown tool_choice", {"tools": [tool], "tool_choice": "sometimes"}, **real),
        bad(
            "tool_choice of another tool",
            {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            **real,
        ),
        bad("unknown response_format in a chat", {"response_format": {"type": "x"}}, **real),
        bad("response_format without schema in a chat", {"response_format": {"type": "json_schema"}}, **real),
        bad("unknown reasoning_effort", {"reasoning_effort": "enormous"}, **real),
        bad("prompt turned on twice", {"add_generation_prompt": True, "continue_final_message": True}, **real),
        bad("text as documents", {"documents": "x"}, **real),
        bad("number as chat_template", {"chat_template": 5}, **real),
    ]


def _routes(model: str) -> list[BadRequest]:
    """Wrong methods and routes that do not exist."""

    def bare(name: str, method: str, path: str, *statuses: int) -> BadRequest:
        return BadRequest(name, method, path, (), b"", statuses)

    posts = {"chat": CHAT, "completions": COMPLETIONS, "tokenize": "/tokenize", "detokenize": "/detokenize"}
    gets = {"models": "/v1/models", "model": f"/v1/models/{model}", "health": "/health", "metrics": "/metrics"}
    good = _good(model)
    return [
        *(bare(f"GET {name}", "GET", path, 405) for name, path in posts.items()),
        *(bare(f"DELETE {name}", "DELETE", path, 405) for name, path in posts.items()),
        *(bare(f"PUT {name}", "PUT", path, 405) for name, path in posts.items()),
        *(_post(f"POST {name}", path, good, 405) for name, path in gets.items()),
        bare("OPTIONS chat", "OPTIONS", CHAT, 405),
        bare("PATCH models", "PATCH", "/v1/models", 405),
        bare("unknown route", "GET", "/v2/anything", 404),
        bare("root", "GET", "/", 404),
        _post("unknown route with a body", "/v1/embeddings", good, 404),
        _post("engine's abort route", "/disagg/v1/abort", {"request_id": "x"}, 404),
        _post("engine's settle route", "/disagg/v1/settle", {"handoff_ids": ["x-1"]}, 404),
        _post("engine's probe route", "/disagg/v1/probe", {"prompt_token_ids": [1]}, 404),
        bare("engine's stats route", "GET", "/disagg/v1/stats", 404),
        _post("trailing slash", CHAT + "/", _good_chat(model), 404),
        _post("doubled slash", "//v1/completions", good, 404),
        _post("path that climbs", "/v1/../v1/completions", good, 404),
        _post("upper case path", "/V1/COMPLETIONS", good, 404),
        _post("escaped path", "/v1%2Fcompletions/x", good, 404),
        bare("unknown model card", "GET", "/v1/models/gpt-4", 404),
        bare("model card without a name", "GET", "/v1/models/", 404),
        bare("unknown admin route", "GET", "/admin/v1/anything", 404),
        bare("admin root", "GET", "/admin", 404),
    ]


def _admin() -> list[BadRequest]:
    """The admin API: keys first, then bodies with the right key. An application without a key answers 403."""
    four = {"num_replicas": 4}
    keyed = {"needs_admin_key": True}

    def with_key(value: str) -> tuple[tuple[str, str], ...]:
        return (*JSON_HEADERS, ("authorization", value))

    def bad(name: str, body: Any, *statuses: int, path: str = SCALE, **more: Any) -> BadRequest:
        return _post(name, path, body, *statuses, **keyed, **more)

    return [
        BadRequest("GET scale", "GET", SCALE, (), b"", (405,), **keyed),
        bad("POST pools", four, 405, path="/admin/v1/pools"),
        BadRequest("GET scale without key", "GET", SCALE, (), b"", (401, 403)),
        _post("POST pools without key", "/admin/v1/pools", four, 401, 403),
        BadRequest("pools without key", "GET", "/admin/v1/pools", (), b"", (401, 403)),
        BadRequest("pools with a wrong key", "GET", "/admin/v1/pools", with_key("Bearer wrong"), b"", (401, 403)),
        _post("scale without key", SCALE, four, 401, 403),
        _post("scale with a wrong key", SCALE, four, 401, 403, headers=with_key("Bearer wrong")),
        _post("scale with an empty key", SCALE, four, 401, 403, headers=with_key("Bearer ")),
        _post("scale with another scheme", SCALE, four, 401, 403, headers=with_key("Basic d3Jvbmc6d3Jvbmc=")),
        _post("scale with a key that is no ASCII", SCALE, four, 401, 403, headers=with_key("Bearer \xe9\xff")),
        _post("malformed scale without key", SCALE, b"{", 401, 403),
        _post("unknown pool without key", "/admin/v1/pools/gpu/scale", four, 401, 403),
        bad("unknown pool", four, 404, path="/admin/v1/pools/gpu/scale", param="pool"),
        bad("malformed scale", b"{"),
        bad("empty scale body", b""),
        bad("empty scale object", {}, param="num_replicas"),
        bad("array to scale", [4]),
        bad("zero replicas", {"num_replicas": 0}, param="num_replicas"),
        bad("negative replicas", {"num_replicas": -1}, param="num_replicas"),
        bad("too many replicas", {"num_replicas": 1025}, param="num_replicas"),
        bad("fractional replicas", {"num_replicas": 1.5}, param="num_replicas"),
        bad("text as replicas", {"num_replicas": "4"}, param="num_replicas"),
        bad("true as replicas", {"num_replicas": True}, param="num_replicas"),
        bad("null as replicas", {"num_replicas": None}, param="num_replicas"),
        bad("unknown field to scale", {"num_replicas": 4, "force": True}, param="force"),
        bad("text to scale", four, 415, headers=(("content-type", "text/plain"),)),
        bad("too large a scale body", b" " * (MAX_BODY_BYTES + 1), 413),
    ]
