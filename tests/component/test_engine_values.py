# SPDX-License-Identifier: Apache-2.0
"""Values of vLLM's arguments before vLLM's own classes: each wrong one is a problem at its path, each right one none.

Two processes judge all of them, one for engines on GPUs, which are not here, and one for engines on CPUs.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path
from typing import Literal

import pytest
import yaml

from disagg.advice.fit import check_engine_kwargs
from disagg.advice.paths import resolve
from disagg.advice.problems import Problem
from disagg.advice.values import ask_vllm, check_values, environment_of, question_of
from disagg.config import AppConfig
from pools.plan.engine_kwargs import known_engine_kwargs
from pools.plan.verdicts import Question, Verdict
from tests.support.engine_values import GPU_MODEL, RIGHT, RIGHT_ON_CPU, WRONG, WRONG_TOGETHER, File, files
from tests.support.stack import tiny_model

ROOT = Path(__file__).parents[2]
PREFIX = "applications[0].args"
Groups = dict[str, list[tuple[File, list[Problem]]]]


@functools.cache
def judged() -> Groups:
    """Every file of the tables, and every shipped one, with its problems."""
    tiny = str(tiny_model())
    shipped = [_shipped(path) for path in sorted((ROOT / "configs").glob("*.yaml"))]
    on_gpus = {
        "wrong": list(files(WRONG, platform="cuda", source=GPU_MODEL)),
        "right": list(files(RIGHT, platform="cuda", source=GPU_MODEL)),
        "shipped": [file for file in shipped if _config(file).platform == "cuda"],
    }
    on_cpus = {
        "right on CPU": list(files(RIGHT_ON_CPU, platform="cpu", source=tiny)),
        "wrong together": list(files(WRONG_TOGETHER, platform="cpu", source=tiny)),
        "shipped on CPU": [file for file in shipped if _config(file).platform == "cpu"],
    }
    return {**_judged(on_gpus, "cuda"), **_judged(on_cpus, "cpu")}


def _shipped(path: Path) -> File:
    return File((), yaml.safe_load(path.read_text(encoding="utf-8")), ())


def _config(file: File) -> AppConfig:
    return resolve(AppConfig.model_validate(file.data["applications"][0]["args"]), ROOT)


def _judged(groups: dict[str, list[File]], platform: Literal["cpu", "cuda"]) -> Groups:
    """One question for all files: to vLLM each has two pools of one large application."""
    known = known_engine_kwargs()
    listed = [(name, file, _config(file)) for name, group in groups.items() for file in group]
    found = [check_engine_kwargs(config, known, PREFIX) for _, _, config in listed]
    pools = {}
    for index, (_, _, config) in enumerate(listed):
        question = question_of(config, {problem.path for problem in found[index]}, PREFIX)
        assert question is not None
        pools |= {f"{index} {pool}": arguments for pool, arguments in question.pools.items()}
    asked = Question(platform=platform, is_local=platform == "cpu", pools=pools)
    answer = ask_vllm(asked, environment_of(listed[0][2]))
    assert not isinstance(answer, str), answer
    assert len(answer.unjudged) == (platform == "cuda"), answer.unjudged
    verdicts: dict[int, list[Verdict]] = defaultdict(list)
    for verdict in answer.verdicts:
        index, pool = verdict.pool.split(" ")
        verdicts[int(index)].append(verdict.model_copy(update={"pool": pool}))
    judged: Groups = defaultdict(list)
    for index, (name, file, config) in enumerate(listed):
        judged[name].append((file, [*found[index], *check_values(config, verdicts[index], PREFIX)]))
    return judged


def unlike(group: str) -> list[str]:
    """What is refused and should not be, and what is not and should be."""
    faults = []
    for file, problems in judged()[group]:
        expected = set(file.paths) if group.startswith("wrong") else set()
        refused = {problem.path: problem for problem in problems if problem.severity == "error"}
        faults += [f"not refused: {path}" for path in expected - refused.keys()]
        faults += [f"refused: {refused[path]}" for path in refused.keys() - expected]
    return faults


def test_the_tables_are_long_enough() -> None:
    """At least sixty wrong values of forty arguments, and sixty right ones."""
    assert len(WRONG) >= 60
    assert len({case.argument for case in WRONG}) >= 40
    assert len(RIGHT) >= 60


@pytest.mark.parametrize("group", ["wrong", "right", "shipped", "right on CPU", "wrong together", "shipped on CPU"])
def test_values(group: str) -> None:
    """Exactly the wrong values are refused, each at the path of the very field."""
    assert judged()[group]
    assert unlike(group) == []


def test_a_problem_says_what_is_allowed_or_what_to_do() -> None:
    """Each names values, a type, a bound, or what vLLM itself says; none is a traceback."""
    problems = [problem for _, found in judged()["wrong"] for problem in found]
    assert len(problems) >= len(WRONG)
    assert not [problem for problem in problems if not (problem.allowed or problem.action)]
    assert not [problem for problem in problems if "Traceback" in str(problem) or "\n" in str(problem)]


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("dtype", "bf16", "did you mean 'bfloat16'?"),
        ("kv_cache_dtype", "fp9", "did you mean 'fp8'?"),
        ("reasoning_parser", "qwen33", "did you mean 'qwen3'?"),
        ("tool_call_parser", "hermes3", "did you mean 'hermes'?"),
        ("load_format", "safetensor", "did you mean 'safetensors'?"),
        ("attention_backend", "FLASHATTN", "did you mean 'FLASH_ATTN'?"),
        ("max_model_len", "4k", "write 4000"),
        ("max_model_len", "auto", "write -1"),
        ("max_num_batched_tokens", "8K", "a whole number from 1"),
        ("max_num_queued_tokens", "10k", "write 10000"),
        ("log_level", "debug", "did you mean 'DEBUG'?"),
        ("enable_log_outputs", True, "requires enable_log_requests"),
    ],
)
def test_words(argument: str, value: object, words: str) -> None:
    """The nearest name that vLLM has, the number that its command line would have read, or vLLM's own reason."""
    found = [
        str(problem)
        for file, problems in judged()["wrong"]
        for case, path in zip(file.cases, file.paths, strict=True)
        for problem in problems
        if problem.path == path and case.argument == argument and case.value == value
    ]
    assert len(found) == 1
    assert words in found[0]
