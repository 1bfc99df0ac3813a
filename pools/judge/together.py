# SPDX-License-Identifier: Apache-2.0
"""All arguments of one engine on the way that an engine's arguments go, and which of them is to blame when it ends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
from vllm.parser.parser_manager import ParserManager
from vllm.usage.usage_lib import UsageContext

from pools.engine.vllm_arguments import split_args

Way = Callable[[Mapping[str, Any]], None]
"""Raises what vLLM raises for these arguments."""


def server_start(arguments: Mapping[str, Any]) -> None:
    """Everything that the start of a server does with its arguments before a model and a device come into it."""
    engine_args, namespace = split_args(copy.deepcopy(dict(arguments)))
    engine_args.create_logging_config()
    engine_args.create_load_config()
    engine_args.create_observability_config()
    engine_args.create_structured_outputs_config()
    engine_args.create_watermark_config()
    engine_args.create_diffusion_config()
    validate_parsed_serve_args(namespace)
    ParserManager.get_parser(
        tool_parser_name=namespace.tool_call_parser,
        reasoning_parser_name=namespace.structured_outputs_config.reasoning_parser,
        enable_auto_tools=namespace.enable_auto_tool_choice,
        model_name=namespace.model,
        tool_strict_level=namespace.tool_strict_level,
    )


def engine_start(arguments: Mapping[str, Any]) -> None:
    """What `AsyncLLM.from_engine_args` does first: every config class is made, for this device and this model."""
    engine_args, _ = split_args(copy.deepcopy(dict(arguments)))
    engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)


def blamed(given: Mapping[str, Any], way: Way) -> Iterator[tuple[str | None, Exception]]:
    """Arguments without which vLLM gets on, one after the other, each with what vLLM said of it.

    Those that the message names are tried first. None instead of a name: leaving out one argument does not help.
    """
    left = dict(given)
    while (error := _outcome(left, way)) is not None:
        said = str(error).replace("-", "_")
        culprit: str | None = None
        for name in sorted(left, key=lambda name: name not in said):
            without = _outcome({key: value for key, value in left.items() if key != name}, way)
            if without is None:
                culprit = name
                break
            if culprit is None and str(without) != str(error):
                culprit = name
        yield culprit, error
        if culprit is None:
            return
        del left[culprit]


def _outcome(given: Mapping[str, Any], way: Way) -> Exception | None:
    try:
        way(given)
    except Exception as exc:
        return exc
    return None
