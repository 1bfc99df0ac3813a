# SPDX-License-Identifier: Apache-2.0
"""The request bodies in the gateway's OpenAPI document.

They name what the OpenAI API documents; vLLM takes more and checks everything, so unknown fields are allowed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_STRING_OR_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}

_SAMPLING: dict[str, Any] = {
    "model": {"type": "string"},
    "max_tokens": {"type": "integer", "minimum": 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 8},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "stop": _STRING_OR_STRINGS,
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number"}},
    "min_tokens": {"type": "integer", "minimum": 0},
    "stream": {"type": "boolean"},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": "boolean"}},
    },
    "user": {"type": "string"},
    "disagg_store": {
        "type": "string",
        "enum": ["never", "always"],
        "description": (
            "Whether the shared cache keeps the KV of this prompt: never, or always, also when a decode engine "
            "consumes it. Absent: the server's setting decides."
        ),
    },
}

CHAT: dict[str, Any] = {
    "type": "object",
    "required": ["model", "messages"],
    "properties": {
        **_SAMPLING,
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {
                    "role": {"type": "string", "enum": ["system", "user", "assistant", "tool"]},
                    "content": {"type": "string"},
                    "name": {"type": "string"},
                    "tool_call_id": {"type": "string"},
                },
            },
        },
        "max_completion_tokens": {"type": "integer", "minimum": 1},
        "logprobs": {"type": "boolean"},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "response_format": {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
                "json_schema": {"type": "object"},
            },
        },
        "tools": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "function"],
                "properties": {
                    "type": {"type": "string", "enum": ["function"]},
                    "function": {
                        "type": "object",
                        "required": ["name"],
                        "properties": {
                            "name": {"type": "string"},
                            "description": {"type": "string"},
                            "parameters": {"type": "object"},
                        },
                    },
                },
            },
        },
        "tool_choice": {"type": "string", "enum": ["none", "auto", "required"]},
    },
}

COMPLETIONS: dict[str, Any] = {
    "type": "object",
    "required": ["model", "prompt"],
    "properties": {
        **_SAMPLING,
        "prompt": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    "minItems": 1,
                },
            ]
        },
        "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "echo": {"type": "boolean"},
        "suffix": {"type": "string"},
        "best_of": {"type": "integer", "minimum": 1, "maximum": 8},
    },
}

TOKENIZE: dict[str, Any] = {
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {"type": "string"},
        "prompt": {"type": "string"},
        "messages": CHAT["properties"]["messages"],
        "add_special_tokens": {"type": "boolean"},
        "return_token_strs": {"type": "boolean"},
    },
}

DETOKENIZE: dict[str, Any] = {
    "type": "object",
    "required": ["model", "tokens"],
    "properties": {
        "model": {"type": "string"},
        "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    },
}

SCALE: dict[str, Any] = {
    "type": "object",
    "required": ["num_replicas"],
    "properties": {"num_replicas": {"type": "integer", "minimum": 1, "maximum": 1024}},
    "additionalProperties": False,
}

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]},
            },
        }
    },
}


RETRY_AFTER: dict[str, Any] = {
    "Retry-After": {"description": "Seconds after which to ask again", "schema": {"type": "integer", "minimum": 1}}
}
"""Headers of every 429 and 503."""


def for_model(schema: dict[str, Any], model_id: str) -> dict[str, Any]:
    """A request schema that names the one model of this server."""
    return {**schema, "properties": {**schema["properties"], "model": {"type": "string", "enum": [model_id]}}}


def operation(schema: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its own JSON body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def secure(document: dict[str, Any], key_of: Callable[[str, str], str | None]) -> None:
    """Say in a document which key each operation asks for.

    Args:
        key_of: of a method and a path, the name of a bearer scheme, or None for an open operation.
    """
    schemes: set[str] = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            name = key_of(method.upper(), path)
            operation["security"] = [] if name is None else [{name: []}]
            schemes |= set() if name is None else {name}
    document.setdefault("components", {})["securitySchemes"] = {
        name: {"type": "http", "scheme": "bearer"} for name in sorted(schemes)
    }


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: the error shape under each status it may answer."""
    shape = {"description": "Error", "content": {"application/json": {"schema": ERROR}}}
    return {status: {**shape, **({"headers": RETRY_AFTER} if status in (429, 503) else {})} for status in statuses}
