# SPDX-License-Identifier: Apache-2.0
"""From names and values to vLLM's engine arguments and the namespace of its OpenAI app.

A replica, the gateway's renderer and the config check take this one way, so that the check judges what the engine gets.
Imports vLLM's argument classes and no engine.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from vllm.config import LoggingConfig, ReasoningConfig, StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

_NESTED: dict[str, type[Any]] = {
    "logging_config": LoggingConfig,
    "reasoning_config": ReasoningConfig,
    "structured_outputs_config": StructuredOutputsConfig,
}
"""Arguments of which vLLM reads attributes before it makes their class of a mapping."""


def split_args(arguments: Mapping[str, Any]) -> tuple[AsyncEngineArgs, argparse.Namespace]:
    """vLLM's engine arguments, and the flat namespace its OpenAI app reads. Loads the plugins that they name.

    Args:
        arguments: names of `AsyncEngineArgs` and `FrontendArgs`, mixed as on vLLM's command line.
    Raises:
        TypeError: for a name that neither knows.
        ValueError: for a value that one of vLLM's classes refuses; pydantic's ValidationError is one.
    """
    frontend = FrontendArgs(**{k: v for k, v in arguments.items() if k in frontend_names()})
    engine_args = AsyncEngineArgs(**{k: _typed(k, v) for k, v in arguments.items() if k not in frontend_names()})
    load_plugins(arguments)
    return engine_args, argparse.Namespace(**(vars(frontend) | vars(engine_args)))


def frontend_names() -> frozenset[str]:
    """The arguments that go to the OpenAI app alone."""
    return frozenset(field.name for field in dataclasses.fields(FrontendArgs))


def load_plugins(arguments: Mapping[str, Any]) -> None:
    """Import the files or modules that register parsers, as vLLM's launcher does before it makes an engine.

    vLLM logs a failure and goes on; a parser that is then missing ends the start.

    Source:
        vLLM 0.32 `entrypoints/launchers/api_server/entry.py`, `run_server_worker`.
    """
    if plugin := arguments.get("tool_parser_plugin"):
        ToolParserManager.import_tool_parser(plugin)
    if plugin := arguments.get("reasoning_parser_plugin"):
        ReasoningParserManager.import_reasoning_parser(plugin)


def _typed(name: str, value: Any) -> Any:
    """A mapping as the class that vLLM's own command line makes of its JSON."""
    if name not in _NESTED or not isinstance(value, Mapping):
        return value
    return TypeAdapter(_NESTED[name]).validate_python(dict(value))
