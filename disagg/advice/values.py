# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM takes the values of `engine_kwargs`, by its own classes.

Importing vLLM takes seconds, so a process of its own does it, one for each check. What it is asked and what its answer
means is pure; `ask_vllm` is the one function that starts something.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from disagg.advice.fit import place_of, pools_of
from disagg.advice.problems import Problem, expected, join, names_in, nearest, plain, shown, unknown_key
from disagg.config import AppConfig
from pools.plan.launch import PLATFORM_VARIABLE, engine_args, engine_env
from pools.plan.placement import placement
from pools.plan.verdicts import Answer, PoolArguments, Question, Verdict

TIME_LIMIT_S = 120.0
"""What the process may take. With everything in the page cache it takes eleven seconds of a slow core."""

_LOOK_S = 0.2
_LAST = 19
"""The niceness of what may take all the time that others leave."""

Ask = Callable[[Question, Mapping[str, str]], Answer | str]
"""Puts a question to vLLM, with the environment of an engine. Text says why there is no answer."""

_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
_MODELS = ("tokenizer", "hf_config_path", "spec_model")
"""Arguments that name a directory or something to download."""


def question_of(config: AppConfig, leave_out: Collection[str], prefix: str) -> Question | None:
    """What to ask about a config; None when it gives no arguments.

    Args:
        leave_out: paths of arguments that are known to be wrong.
    """
    pools = {}
    for name, pool in pools_of(config).items():
        both = {**config.model.engine_kwargs, **pool.engine_kwargs}
        given = {key: value for key, value in both.items() if place_of(config, name, key, prefix) not in leave_out}
        added = engine_args(
            config.model.model_copy(update={"engine_kwargs": {}}),
            pool.model_copy(update={"engine_kwargs": {}}),
            platform=config.platform,
            kv_transfer_config={},
            placement=placement(config.platform, given, config.cpu),
        )
        del added["kv_transfer_config"]  # it names ports and processes that are not there yet
        pools[name] = PoolArguments(given=given, added=added)
    if not any(pool.given for pool in pools.values()):
        return None
    return Question(platform=config.platform, is_local=_is_local(config, pools.values()), pools=pools)


def environment_of(config: AppConfig) -> dict[str, str]:
    """Variables of an engine's process as far as vLLM's argument classes read them."""
    env = engine_env(config.platform, config.cpu, host="127.0.0.1")
    # By this one our plugin would know the process as an engine.
    return {key: value for key, value in env.items() if key != PLATFORM_VARIABLE}


def ask_vllm(
    question: Question,
    env: Mapping[str, str],
    *,
    time_limit_s: float = TIME_LIMIT_S,
    command: Sequence[str] = (sys.executable, "-m", "pools.judge"),
    given_up: Callable[[], bool] | None = None,
) -> Answer | str:
    """The answer of a process that imports vLLM, or why there is none. Blocks for seconds; downloads nothing.

    Args:
        command: the process; the name of the file for its answer is added.
        given_up: asked several times a second; True ends the process. A process that may be given up works behind all
            others.
    """
    with tempfile.TemporaryDirectory(prefix="disagg-check-") as directory:
        file = Path(directory) / "answer.json"
        process = subprocess.Popen(
            [*command, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**_without_offline_switches(os.environ), **env, "VLLM_LOGGING_LEVEL": "ERROR"},
            start_new_session=True,  # vLLM may start a process that looks at the model's class
        )
        try:
            if given_up is not None:
                os.setpriority(os.PRIO_PROCESS, process.pid, _LAST)
            said = _communicate(process, question.model_dump_json().encode(), time_limit_s, given_up)
        except subprocess.TimeoutExpired:
            return f"the process that asks vLLM took longer than {time_limit_s:g} s"
        finally:
            _end(process)
        if said is None:
            return "nobody waits for it any more"
        if process.returncode:
            last = said.decode(errors="replace").strip().rpartition("\n")[2]
            return f"the process that asks vLLM ended with code {process.returncode}: {last[:300]}"
        try:
            return Answer.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as exc:
            return f"the process that asks vLLM gave no answer: {str(exc).splitlines()[0]}"


def _communicate(
    process: subprocess.Popen[bytes], question: bytes, time_limit_s: float, given_up: Callable[[], bool] | None
) -> bytes | None:
    """What it wrote to stderr; None when it was given up.

    Raises:
        TimeoutExpired: it took longer.
    """
    deadline, rest = time.monotonic() + time_limit_s, question
    while given_up is None or not given_up():
        try:
            return process.communicate(rest or None, timeout=min(_LOOK_S, time_limit_s))[1]
        except subprocess.TimeoutExpired:
            rest = b""  # it is on its way
            if time.monotonic() > deadline:
                raise
    return None


def check_values(config: AppConfig, verdicts: Iterable[Verdict], prefix: str) -> list[Problem]:
    """The problems that the verdicts amount to, each at the path of the field. Pure."""
    grouped: dict[tuple[str, str], list[Verdict]] = {}
    places: dict[tuple[str, str], tuple[Any, str]] = {}
    for verdict in verdicts:
        own = pools_of(config)[verdict.pool].engine_kwargs
        if verdict.argument is None:
            path, value = f"{prefix}.{verdict.pool if own else 'model'}.engine_kwargs", None
        else:
            given = {**config.model.engine_kwargs, **own}
            parts, value = _inside(given[verdict.argument], verdict.loc)
            path = join(place_of(config, verdict.pool, verdict.argument, prefix), parts)
        # What is wrong with an argument of both pools is found once for each.
        grouped.setdefault((path, verdict.pool), []).append(verdict)
        places[path, verdict.pool] = value, str(verdict.loc[-1] if verdict.loc else verdict.argument)
    found = (_problem(path, *places[path, pool], same) for (path, pool), same in grouped.items())
    return list(dict.fromkeys(found))


def _problem(path: str, value: Any, key: str, verdicts: Sequence[Verdict]) -> Problem:
    """One problem of all verdicts on one place. A value that may be of several types is refused by each of them."""
    first = verdicts[0]
    match first.kind:
        case "name" if first.ctx["what"] == "key":
            return unknown_key(path, key, first.ctx["names"])
        case "name":
            return _choice(path, first.message, value, first.ctx["names"])
        case "absent":
            return Problem(path, first.message, "a file on every node with replicas", "correct it")
        case "not_importable":
            allowed, action = "what every replica can import", "install it on every node"
            return Problem(path, f"cannot be loaded here: {first.message}", allowed, action, severity="warning")
        case "raised":
            what = "these arguments" if first.argument is None else shown(value)
            message = f"vLLM refuses {what}: {_without_flags(first.message)}"
            return Problem(path, message, action="change it" if first.argument else "change one of them")
    names = [name for verdict in verdicts for name in names_in(verdict.kind, verdict.ctx)]
    if names:
        return _choice(path, f"{shown(value)} is not possible", value, names)
    if len(verdicts) == 1:
        problem = plain(path, first.kind, first.message.removeprefix("Value error, "), value, first.ctx)
    else:
        wanted = dict.fromkeys(word for verdict in verdicts if (word := expected(verdict.kind)) is not None)
        problem = Problem(path, f"{shown(value)} is not possible", " or ".join(wanted) or None, "change the value")
    if (written := first.ctx.get("written")) is not None:
        action = f"write {written}, which is what vLLM's command line makes of such text"
        return replace(problem, action=action)
    return problem if problem.allowed or problem.action else replace(problem, action="change the value")


def _choice(path: str, message: str, value: Any, names: Sequence[str]) -> Problem:
    guess = nearest(value, names)
    action = f"did you mean {guess!r}?" if guess is not None else "use one of these"
    return Problem(path, message, ", ".join(name for name in names if name), action)


def _without_flags(message: str) -> str:
    """What vLLM says, with names of arguments for flags of its command line."""
    return _FLAG.sub(lambda flag: flag[1].replace("-", "_"), message.removeprefix("Error: "))


def _inside(value: Any, loc: Sequence[int | str]) -> tuple[list[int | str], Any]:
    """The parts of `loc` that lead into the value, and what is there. The rest names types that were tried."""
    parts: list[int | str] = []
    for part in loc:
        here = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list) else {}
        if part not in here:
            break
        value = here[part]
        parts.append(part)
    return parts, value


def _is_local(config: AppConfig, pools: Iterable[PoolArguments]) -> bool:
    """Whether vLLM finds the model and what belongs to it without a download."""
    sources = [config.model.source]
    for pool in pools:
        speculative = pool.given.get("speculative_config")
        models = [pool.given.get(name) for name in _MODELS]
        models.append(speculative.get("model") if isinstance(speculative, Mapping) else None)
        sources += [source for source in models if isinstance(source, str)]
    return all(Path(source).exists() for source in sources)


def _without_offline_switches(environment: Mapping[str, str]) -> dict[str, str]:
    """With these vLLM looks for the model in a cache, which says nothing of the values."""
    return {key: value for key, value in environment.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process where it still runs, and what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
