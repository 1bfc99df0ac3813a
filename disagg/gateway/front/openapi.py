# SPDX-License-Identifier: Apache-2.0
"""The gateway's OpenAPI document: request bodies, errors, keys. Pure.

Bodies are those of vLLM's own request models. The gateway passes on what they take, and vLLM checks it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

from disagg.gateway.front.fields import FORBIDDEN_FIELDS, STORE_FIELD

Body = Literal["ChatBody", "CompletionsBody", "TokenizeBody", "DetokenizeBody"]
REFERENCE = "#/components/schemas/{model}"
"""How one schema of the document refers to another."""

STORE: dict[str, Any] = {
    "type": "string",
    "enum": ["never", "always"],
    "description": (
        "Whether the shared cache keeps the KV of this prompt: never, or always, also when a decode engine "
        "consumes it. Absent: the server's setting decides."
    ),
}
"""`disagg_store`, the one field that is not vLLM's."""

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


def reference(body: Body) -> dict[str, Any]:
    """Refers to one of `request_bodies`."""
    return {"$ref": REFERENCE.format(model=body)}


def request_bodies(schemas: Mapping[str, Any], model_id: str) -> dict[str, Any]:
    """The request bodies and what they refer to, by name: vLLM's, as this server takes them. Pure.

    Args:
        schemas: of every `Body`, and of what they refer to, see `Renderer.schemas`. Left as they are.
        model_id: the one model of this server.
    """
    taken = copy.deepcopy(dict(schemas))
    for body in get_args(Body):
        for shape in _shapes(taken, taken[body]):
            properties = shape["properties"]
            for name in FORBIDDEN_FIELDS:
                properties.pop(name, None)
            properties["model"] = {"type": "string", "enum": [model_id]}
            shape["required"] = sorted({*shape.get("required", ()), "model"})
            if body in ("ChatBody", "CompletionsBody"):
                properties[STORE_FIELD] = STORE
    return taken


def _shapes(schemas: Mapping[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects that a schema stands for: itself, what it refers to, or each of its choices."""
    if "$ref" in schema:
        yield from _shapes(schemas, schemas[schema["$ref"].rpartition("/")[2]])
    elif "anyOf" in schema:
        for choice in schema["anyOf"]:
            yield from _shapes(schemas, choice)
    else:
        yield schema


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
