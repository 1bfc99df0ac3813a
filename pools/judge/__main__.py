# SPDX-License-Identifier: Apache-2.0
"""`python -m pools.judge ANSWER`: a `Question` comes on stdin, its `Answer` goes to the file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from pools.borrowed import BORROWED
from pools.engine.vllm_arguments import load_plugins
from pools.judge.names import PLUGINS, is_registered, name_errors, plugin_errors
from pools.judge.together import blamed, engine_start, server_start
from pools.judge.types import is_default, type_errors
from pools.judge.words import Error, raised, said
from pools.plan.verdicts import Answer, PoolArguments, Question, Verdict
from transport.upstream.guard import require

_OF_A_DEVICE = ("compilation_config", "mamba_config")
"""Arguments whose classes look at the device when they are made."""
_RELIES_ON = {
    "enable_auto_tool_choice": ("tool_call_parser", "tool_parser_plugin"),
    "reasoning_parser": ("reasoning_parser_plugin",),
    "structured_outputs_config": ("reasoning_parser_plugin",),
    "tool_call_parser": ("tool_parser_plugin",),
}
"""Arguments that fail for the reason that another one is wrong."""


def answer(question: Question) -> Answer:
    """Everything that vLLM does not take, by pool."""
    load_general_plugins()
    here = current_platform.is_cpu() if question.platform == "cpu" else current_platform.is_cuda()
    verdicts: list[Verdict] = []
    unjudged: list[str] = []
    if not here:
        unjudged.append(f"how engine_kwargs go together on {question.platform}, which vLLM does not find here")
    elif not question.is_local:
        unjudged.append("how engine_kwargs go together with the model, whose files are not here")
    for name, arguments in question.pools.items():
        found = [Verdict(pool=name, argument=argument, **error) for argument, error in _one_by_one(arguments.given)]
        wrong = {one.argument for one in found}
        sound = {
            key: value
            for key, value in arguments.given.items()
            if key not in wrong and wrong.isdisjoint(_RELIES_ON.get(key, ()))
        }
        found += [
            Verdict(pool=name, argument=argument, **raised(exc))
            for argument, exc in _together(sound, arguments, unjudged, here=here, is_local=question.is_local)
        ]
        verdicts += found
    return Answer(verdicts=tuple(verdicts), unjudged=tuple(dict.fromkeys(unjudged)))


def _one_by_one(given: Mapping[str, Any]) -> Iterator[tuple[str, Error]]:
    """What is wrong with each value by itself, which holds on every platform."""
    load_plugins({name: value for name, value in given.items() if name in PLUGINS and not list(plugin_errors(value))})
    for name, value in given.items():
        if is_default(name, value):
            continue
        errors = [] if is_registered(name) else list(type_errors(name, value))
        yield from ((name, error) for error in errors or name_errors(name, value, given))


def _together(
    sound: dict[str, Any], arguments: PoolArguments, unjudged: list[str], *, here: bool, is_local: bool
) -> Iterator[tuple[str | None, Exception]]:
    """What is wrong with values that are right one by one. Adds to `unjudged` what keeps vLLM from saying it."""
    if not here:
        sound = {key: value for key, value in sound.items() if key not in _OF_A_DEVICE}
    for name, exc in blamed(sound, lambda given: server_start({**arguments.added, **given})):
        yield name, exc
        if name is None:
            return
        del sound[name]
    if not here or not is_local:
        return
    try:
        engine_start(arguments.added)
    except Exception as exc:
        # Not the arguments' fault, or a model that needs some of them.
        reason = f"which vLLM cannot read without them: {said(exc)[:200]}"
        unjudged.append(f"how engine_kwargs go together with the model, {reason}")
        return
    yield from blamed(sound, lambda given: engine_start({**arguments.added, **given}))


if __name__ == "__main__":
    require(BORROWED, "pools.judge")
    require(BORROWED, "pools.engine.vllm_arguments")
    found = answer(Question.model_validate_json(sys.stdin.buffer.read()))
    Path(sys.argv[1]).write_text(found.model_dump_json(), encoding="utf-8")
