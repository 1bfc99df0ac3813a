# SPDX-License-Identifier: Apache-2.0
"""What docs/api.md says of vLLM: its other routes, and the flags that its refusals name. Reads source alone."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from disagg.gateway.front.flags import with_settings
from disagg.pages.api import NOT_SERVED
from pools.config import RESERVED_ENGINE_KWARGS
from pools.plan.engine_kwargs import known_engine_kwargs

REFUSALS = (
    "entrypoints/generate/base",
    "entrypoints/openai",
    "entrypoints/serve/tokenize",
    "multimodal/media",
    "multimodal/processing",
    "renderers",
    "sampling_params.py",
    "v1/engine/async_llm.py",
    "v1/engine/input_processor.py",
)
"""Where vLLM says what is wrong with a request."""


def vllm() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def refusals(path: Path) -> Iterator[str]:
    """Text of what a file raises, or answers as an error."""
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            said = isinstance(node, ast.Call) and "create_error_response" in ast.unparse(node.func)
            if said or isinstance(node, ast.Raise):
                constants = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
                yield " ".join(value for value in constants if isinstance(value, str))


def test_routes_that_are_not_served_are_vllms() -> None:
    """Each path of the list stands in vLLM's source."""
    sources = "".join(file.read_text(encoding="utf-8") for file in (vllm() / "entrypoints").rglob("*.py"))
    assert [path for paths in NOT_SERVED for path in paths if f'"{path}"' not in sources] == []


def test_the_setting_of_each_flag_in_a_refusal_is_known() -> None:
    """What vLLM tells a client to start the server with is an engine argument, and so its setting is named."""
    settable = (known_engine_kwargs() or frozenset()) - RESERVED_ENGINE_KWARGS.keys()
    told = [message for place in REFUSALS for message in refusals(vllm() / place) if "--" in message]
    assert any("--tool-call-parser" in message for message in told)
    assert len(told) > 10
    assert [message for message in told if with_settings(message, settable) == message] == []
