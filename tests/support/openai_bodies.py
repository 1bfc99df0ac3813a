# SPDX-License-Identifier: Apache-2.0
"""Request bodies with the fields that the OpenAI API documents: what generated requests are made of.

The gateway's own document has every field that vLLM takes. `restricted` leaves these of it.
"""

from __future__ import annotations

from typing import Any

from disagg.gateway.front.openapi import Body

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
    "disagg_store": {"type": "string", "enum": ["never", "always"]},
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

BODIES: dict[Body, dict[str, Any]] = {
    "ChatBody": CHAT,
    "CompletionsBody": COMPLETIONS,
    "TokenizeBody": TOKENIZE,
    "DetokenizeBody": DETOKENIZE,
}


def restricted(document: dict[str, Any], model_id: str) -> dict[str, Any]:
    """The gateway's OpenAPI document with these bodies in the place of vLLM's."""
    model = {"type": "string", "enum": [model_id]}
    bodies = {
        name: {**schema, "properties": {**schema["properties"], "model": model}} for name, schema in BODIES.items()
    }
    assert set(bodies) <= set(document["components"]["schemas"])
    return {**document, "components": {**document["components"], "schemas": bodies}}
