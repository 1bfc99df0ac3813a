# SPDX-License-Identifier: Apache-2.0
"""From an HTTP request to what it asks for, and what a client must not send."""

from __future__ import annotations

import re
import uuid
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args

import msgspec
from starlette.requests import ClientDisconnect, Request

from disagg.config import GatewayConfig
from disagg.errors import InvalidRequestError, ModelNotFoundError
from disagg.gateway.front.body import Bodies, Held, check_shape
from disagg.gateway.front.fields import FORBIDDEN_FIELDS, STORE_FIELD, Endpoint
from disagg.gateway.front.tenants import SCOPE_KEY, Tenant, check_media_ids, salted
from transport.handoff_params import Store

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACE_HEADERS = ("traceparent", "tracestate")
_TOOL_FIELDS = ("tools", "functions")
_HOLDING = (list, dict)
_ID_FIELDS = ("prompt", "tokens", "allowed_token_ids")
"""Fields that may hold as many token ids as a body may have values."""
_COUNTED_APART = frozenset(("messages", *_TOOL_FIELDS))
_JSON_OUTPUTS = ("json", "structural_tag")
"""Entries of `structured_outputs` that vLLM parses when they are text."""
_OF_MESSAGE: Sequence[tuple[str, type | UnionType, str]] = (
    ("role", str, "a text"),
    ("content", str | list | None, "a text or a list of parts"),
)
"""Fields of a message, what they may be, and that in words."""
_PROMPTS = "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids"
_encode_json = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Asked:
    """A completion request that was taken in: checked, and not rendered yet."""

    endpoint: Endpoint
    body: Mapping[str, Any]
    """The client's fields, without those that only the gateway reads."""
    raw: bytes
    """`body` as bytes, as far as possible the client's own."""
    request_id: str
    trace: Mapping[str, str]
    """The client's trace context."""
    store: Store | None
    """Whether the shared cache is to keep this prompt's KV; None when the client did not say."""
    tenant: str | None
    """Name of the tenant whose API key the client sent; None where clients need no key."""
    held: Held
    """Whoever sends the request on releases it then."""


async def check_body(body: Mapping[str, Any], config: GatewayConfig, *, model_id: str) -> None:
    """Refuse what must not reach an engine, or would hold up the streams of whoever validates it.

    Raises InvalidRequestError or ModelNotFoundError.
    """
    check_fields(body, model_id=model_id)
    check_prompts(body, config.max_prompts)
    check_parts(body, max_parts=config.max_chat_parts, max_tools=config.max_tools)
    check_lists(body, config.max_field_entries)
    check_kinds(body)
    if texts := list(json_texts(body)):
        text = ",".join(texts).encode("utf-8", "surrogatepass")
        await check_shape(text, max_values=config.max_json_values, what="the JSON text in the request body")


def json_texts(body: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a body that vLLM parses as JSON: arguments of tool calls, and what an answer has to look like."""
    for message in messages if isinstance(messages := body.get("messages"), list) else ():
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), str):
                yield arguments
    if isinstance(outputs := body.get("structured_outputs"), dict):
        yield from (text for name in _JSON_OUTPUTS if isinstance(text := outputs.get(name), str))


async def taken_in(request: Request, endpoint: Endpoint, *, bodies: Bodies, model_id: str) -> Asked:
    """Read and check a completion request. Raises what `Bodies.json_object` raises."""
    held = bodies.held()
    try:
        return await _checked(request, endpoint, bodies, held, model_id)
    except BaseException:
        held.release()
        raise


async def _checked(request: Request, endpoint: Endpoint, bodies: Bodies, held: Held, model_id: str) -> Asked:
    config = bodies.config
    raw, body = await bodies.json_object(request, held)
    await check_body(body, config, model_id=model_id)
    store, raw = take_store(body, raw)
    tenant: Tenant | None = request.scope.get(SCOPE_KEY)
    if tenant is not None:
        check_media_ids(body, tenant)
        raw = salted(body, raw, tenant)
    name = None if tenant is None else tenant.name
    return Asked(endpoint, body, raw, request_id_of(request), forwarded_headers(request), store, name, held)


def check_fields(body: Mapping[str, Any], *, model_id: str) -> None:
    """Refuse fields and models that must not reach an engine. Raises InvalidRequestError or ModelNotFoundError."""
    for name in FORBIDDEN_FIELDS:
        if name in body:
            raise InvalidRequestError(f"Unrecognized request argument supplied: {name}", param=name)
        # vLLM merges `vllm_xargs` into the same arguments that the forbidden fields end in.
        if isinstance(extra := body.get("vllm_xargs"), dict) and name in extra:
            raise InvalidRequestError(f"vllm_xargs must not hold {name}", param=f"vllm_xargs.{name}")
    model = body.get("model")
    if model is None:
        raise InvalidRequestError(f"you must provide a model parameter; this server has {model_id!r}", param="model")
    if not isinstance(model, str):
        raise InvalidRequestError(f"model must be a string, not {type(model).__name__}", param="model")
    if model != model_id:
        raise ModelNotFoundError(f"The model {model!r} does not exist; this server has {model_id!r}.", param="model")


def check_prompts(body: Mapping[str, Any], max_prompts: int) -> None:
    """Raises InvalidRequestError when a completion has more than `max_prompts`, or its list of prompts is none.

    A list of token ids is one prompt. vLLM 0.32 makes two errors of each id of a list that has one text in it.
    """
    prompt = body.get("prompt")
    if not isinstance(prompt, list) or are_token_ids(prompt):
        return
    kinds = set(map(type, prompt))
    if kinds not in ({str}, {list}):
        raise InvalidRequestError(_PROMPTS, param="prompt")
    if len(prompt) > max_prompts:
        raise InvalidRequestError(
            f"the list has {len(prompt)} prompts, this server takes {max_prompts}; send several requests",
            param="prompt",
        )
    if kinds == {list} and not all(map(are_token_ids, prompt)):
        raise InvalidRequestError(_PROMPTS, param="prompt")


def are_token_ids(values: list[Any]) -> bool:
    """Whether all are whole numbers from 0 to 4,294,967,295. Takes some nanoseconds for each."""
    try:
        array("I", values)
    except (TypeError, OverflowError):
        return False
    return True


def check_lists(body: Mapping[str, Any], max_entries: int) -> None:
    """Raises InvalidRequestError for a list or object of more than `max_entries`, unless it holds token ids.

    Entries of what lies right in a field count with the field's own. Validation takes microseconds for each, and makes
    an error of each that has a wrong type; engines look through some of these lists for every token.
    """
    for name, field in body.items():
        if not isinstance(field, _HOLDING) or name in _COUNTED_APART:
            continue
        if name in _ID_FIELDS and isinstance(field, list):
            if name != "prompt" and not are_token_ids(field):
                raise InvalidRequestError(f"{name} must be a list of token ids", param=name)
        elif len(field) > max_entries or len(field) + _num_inner(field) > max_entries:
            raise InvalidRequestError(
                f"{name} has more than {max_entries} entries, the limit of this server (gateway.max_field_entries)",
                param=name,
            )


def _num_inner(field: list[Any] | dict[str, Any]) -> int:
    """Entries of the lists and objects right in a list or object."""
    inner = field.values() if isinstance(field, dict) else field
    return sum(len(held) for held in inner if isinstance(held, _HOLDING))


def check_parts(body: Mapping[str, Any], *, max_parts: int, max_tools: int) -> None:
    """Raises InvalidRequestError when a chat has more messages, content parts and tool calls, or tools, than it may.

    The validation of each costs the gateway and the engine some ten microseconds, in which no stream goes on.
    """
    num_parts = 0
    for message in messages if isinstance(messages := body.get("messages"), list) else ():
        num_parts += 1
        if isinstance(message, dict):
            num_parts += _num_inner(message)
        if num_parts > max_parts:
            raise InvalidRequestError(
                f"the chat has more than {max_parts} messages, content parts and tool calls, the limit of this server "
                "(gateway.max_chat_parts)",
                param="messages",
            )
    for name in _TOOL_FIELDS:
        if isinstance(tools := body.get(name), list) and len(tools) > max_tools:
            raise InvalidRequestError(
                f"the request has {len(tools)} {name}, this server takes {max_tools} (gateway.max_tools)", param=name
            )


def check_kinds(body: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError for a chat whose lists hold something else than what they are made of.

    vLLM 0.32 holds each message and each part against some ten shapes, and makes an error of each shape.
    """
    for name in ("messages", *_TOOL_FIELDS):
        _check_objects(body.get(name), name)
    for i, message in enumerate(messages if isinstance(messages := body.get("messages"), list) else ()):
        for name in ("tool_calls", "tools"):
            _check_objects(message.get(name), f"messages[{i}].{name}")
        for name, allowed, words in _OF_MESSAGE:
            if not isinstance(message.get(name), allowed):
                raise InvalidRequestError(f"messages[{i}].{name} must be {words}", param=f"messages[{i}].{name}")
        if isinstance(content := message.get("content"), list):
            _check_objects([part for part in content if not isinstance(part, str)], f"messages[{i}].content")


def _check_objects(held: Any, where: str) -> None:
    if isinstance(held, list) and not all(isinstance(item, dict) for item in held):
        raise InvalidRequestError(f"{where} must be a list of objects", param=where)


def take_store(body: dict[str, Any], raw: bytes) -> tuple[Store | None, bytes]:
    """Take `disagg_store` out of `body`. Returns its value, and the body's bytes without it.

    Only a body that has the field is encoded again. Raises InvalidRequestError.
    """
    if STORE_FIELD not in body:
        return None, raw
    store = body.pop(STORE_FIELD)
    if store not in get_args(Store):
        raise InvalidRequestError(f"{STORE_FIELD} must be one of {', '.join(get_args(Store))}", param=STORE_FIELD)
    return store, _encode_json(body)


def request_id_of(request: Request) -> str:
    """The client's `X-Request-Id` when it is a plain token of at most 128 characters, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def forwarded_headers(request: Request) -> dict[str, str]:
    """The client's headers that an engine may see: trace context, nothing else."""
    return {
        name: value
        for name in _TRACE_HEADERS
        if (value := request.headers.get(name)) is not None and len(value) <= 512 and value.isascii()
    }


__all__ = [
    "Asked",
    "ClientDisconnect",
    "are_token_ids",
    "check_body",
    "check_fields",
    "check_kinds",
    "check_lists",
    "check_parts",
    "check_prompts",
    "forwarded_headers",
    "json_texts",
    "request_id_of",
    "take_store",
    "taken_in",
]
