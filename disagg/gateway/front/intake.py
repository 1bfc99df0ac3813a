# SPDX-License-Identifier: Apache-2.0
"""From an HTTP request to what it asks for, and what a client must not send."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
from starlette.requests import ClientDisconnect, Request

from disagg.errors import InvalidRequestError, ModelNotFoundError
from disagg.gateway.front.body import Bodies
from disagg.gateway.front.fields import FORBIDDEN_FIELDS, STORE_FIELD, Endpoint
from disagg.gateway.front.tenants import SCOPE_KEY, Tenant, check_media_ids, salted
from transport.handoff_params import Store

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACE_HEADERS = ("traceparent", "tracestate")
_PARTS_OF_MESSAGE = ("content", "tool_calls")
_TOOL_FIELDS = ("tools", "functions")
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


async def taken_in(request: Request, endpoint: Endpoint, *, bodies: Bodies, model_id: str) -> Asked:
    """Read and check a completion request. Raises what `Bodies.json_object` raises."""
    config = bodies.config
    raw, body = await bodies.json_object(request)
    check_fields(body, model_id=model_id)
    check_prompts(body, config.max_prompts)
    check_parts(body, max_parts=config.max_chat_parts, max_tools=config.max_tools)
    store, raw = take_store(body, raw)
    tenant: Tenant | None = request.scope.get(SCOPE_KEY)
    if tenant is not None:
        check_media_ids(body, tenant)
        raw = salted(body, raw, tenant)
    name = None if tenant is None else tenant.name
    return Asked(endpoint, body, raw, request_id_of(request), forwarded_headers(request), store, name)


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
    """Raises InvalidRequestError when a completion has more than `max_prompts`. A list of token ids is one prompt."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > max_prompts and not isinstance(prompt[0], int):
        raise InvalidRequestError(
            f"the list has {len(prompt)} prompts, this server takes {max_prompts}; send several requests",
            param="prompt",
        )


def check_parts(body: Mapping[str, Any], *, max_parts: int, max_tools: int) -> None:
    """Raises InvalidRequestError when a chat has more messages, content parts and tool calls, or tools, than it may.

    The validation of each costs the gateway and the engine some ten microseconds, in which no stream goes on.
    """
    num_parts = 0
    for message in messages if isinstance(messages := body.get("messages"), list) else ():
        num_parts += 1
        if isinstance(message, dict):
            num_parts += sum(
                len(held) for name in _PARTS_OF_MESSAGE if isinstance(held := message.get(name), (list, dict))
            )
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
    "check_fields",
    "check_parts",
    "check_prompts",
    "forwarded_headers",
    "request_id_of",
    "take_store",
    "taken_in",
]
