# SPDX-License-Identifier: Apache-2.0
"""What becomes of vLLM's request schemas in the gateway's document."""

from __future__ import annotations

from typing import Any, get_args

from disagg.gateway.front.fields import FORBIDDEN_FIELDS
from disagg.gateway.front.openapi import REFERENCE, STORE, Body, request_bodies

MODEL = {"type": "string", "enum": ["m"]}


def vllm(**more: Any) -> dict[str, Any]:
    """One request model of vLLM's."""
    return {"type": "object", "properties": {"model": {"type": "string"}, **more}}


def test_bodies_are_those_that_this_server_takes() -> None:
    """Directly, by reference and by choice: one model, no field of the gateway's own, and who stores may say so."""
    forbidden = {name: {"type": "object"} for name in FORBIDDEN_FIELDS}
    told = {
        "ChatBody": {"$ref": REFERENCE.format(model="Chat")},
        "Chat": {**vllm(messages={"type": "array"}, **forbidden), "required": ["messages"]},
        "CompletionsBody": vllm(prompt={}),
        "TokenizeBody": {"anyOf": [{"$ref": REFERENCE.format(model="Prompt")}, vllm(messages={})]},
        "Prompt": vllm(prompt={}, **forbidden),
        "DetokenizeBody": vllm(tokens={}),
    }
    taken = request_bodies(told, "m")
    assert set(taken) == {*get_args(Body), "Chat", "Prompt"}
    assert taken["Chat"]["properties"] == {"model": MODEL, "messages": {"type": "array"}, "disagg_store": STORE}
    assert taken["Chat"]["required"] == ["messages", "model"]
    assert taken["CompletionsBody"]["properties"] == {"model": MODEL, "prompt": {}, "disagg_store": STORE}
    assert taken["Prompt"]["properties"] == {"model": MODEL, "prompt": {}}
    assert taken["TokenizeBody"]["anyOf"][1]["properties"] == {"model": MODEL, "messages": {}}
    assert taken["DetokenizeBody"]["required"] == ["model"]
    assert FORBIDDEN_FIELDS[0] in told["Chat"]["properties"], "what vLLM said was changed"
