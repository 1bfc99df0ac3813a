# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document's request bodies are those of vLLM's own models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from disagg.gateway.front.fields import FORBIDDEN_FIELDS
from disagg.gateway.front.openapi import REFERENCE, Body, request_bodies
from disagg.gateway.front.render import VllmRenderer
from tests.support.openai_bodies import BODIES
from tests.support.stack import tiny_model


@pytest.fixture(scope="module")
def bodies() -> dict[str, Any]:
    renderer = VllmRenderer({"model": str(tiny_model()), "max_model_len": 1024, "dtype": "float32"})
    return request_bodies(renderer.schemas(), "tiny")


def choices(bodies: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects that a schema stands for."""
    if "$ref" in schema:
        return choices(bodies, bodies[schema["$ref"].rpartition("/")[2]])
    return [one for choice in schema["anyOf"] for one in choices(bodies, choice)] if "anyOf" in schema else [schema]


def references(schema: Any) -> Iterator[str]:
    """Every `$ref` in it."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from references(part)


def test_every_reference_leads_somewhere(bodies: dict[str, Any]) -> None:
    """A client generator finds all of it under `components`, and all of it is JSON."""
    found = set(references(bodies))
    assert len(found) > 20 and found <= {REFERENCE.format(model=name) for name in bodies}
    assert json.loads(json.dumps(bodies, allow_nan=False)) == bodies


@pytest.mark.parametrize("body", BODIES)
def test_a_body_has_what_clients_may_send(bodies: dict[str, Any], body: Body) -> None:
    """All that OpenAI documents, one model, and nothing that only the gateway may send."""
    shapes = choices(bodies, bodies[body])
    names = {name for shape in shapes for name in shape["properties"]}
    # vLLM takes any further field without a word, `best_of` among them.
    assert set(BODIES[body]["properties"]) - {"best_of"} <= names and not names & set(FORBIDDEN_FIELDS)
    for shape in shapes:
        assert shape["properties"]["model"]["enum"] == ["tiny"] and "model" in shape["required"]


def test_content_may_be_parts(bodies: dict[str, Any]) -> None:
    """A message's content is a text or a list of parts, as vLLM takes it."""
    [chat] = choices(bodies, bodies["ChatBody"])
    messages = choices(bodies, chat["properties"]["messages"]["items"])
    kinds = {kind.get("type") for one in messages for kind in _alternatives(one["properties"].get("content", {}))}
    assert {"string", "array"} <= kinds


def _alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return schema.get("anyOf", [schema])
