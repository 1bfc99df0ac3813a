# SPDX-License-Identifier: Apache-2.0
"""A config is judged once more after a replica has not started, beside the start."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from disagg.advice.check import CheckReport
from disagg.advice.problems import Problem
from disagg.cli.second_opinion import SecondOpinion
from tests.support.stack import wait_until

KWARGS = "applications[0].args.model.engine_kwargs"


def opinion_of(*problems: Problem) -> SecondOpinion:
    return SecondOpinion("app.yaml", check=lambda *_, **__: CheckReport("app.yaml", problems))


def test_nothing_is_asked_before() -> None:
    """A start that goes well costs nothing, and its end neither."""
    opinion = SecondOpinion("app.yaml", check=lambda *_, **__: pytest.fail("it was asked"))
    assert opinion.found() is None
    opinion.end()


def test_a_wrong_value_is_found() -> None:
    """The first error of an engine's arguments, with its path."""
    warning = Problem(f"{KWARGS}.seed", "is a warning", severity="warning")
    opinion = opinion_of(warning, Problem(f"{KWARGS}.dtype", "'bf16' is unknown"), Problem(KWARGS, "is not told"))
    opinion.ask()
    wait_until(lambda: opinion.found() is not None, 5, "it is found")
    assert opinion.found() == f"{KWARGS}.dtype: 'bf16' is unknown"


def test_the_machine_is_not_judged() -> None:
    """What is free on it says nothing while engines start there."""
    opinion = opinion_of(Problem("applications[0].args.cpu.kv_cache_gib", "does not fit"))
    opinion.ask()
    opinion.end()
    assert opinion.found() is None


def test_it_is_asked_once_and_given_up() -> None:
    """However often replicas fail; its end waits for what was asked."""
    asked, given_up = [], threading.Event()

    def check(config: str, *, update: bool, ask: Any) -> CheckReport:
        asked.append((config, update))
        assert given_up.wait(5)
        return CheckReport(config, ())

    opinion = SecondOpinion("app.yaml", check=check)
    opinion.ask()
    opinion.ask()
    threading.Timer(0.1, given_up.set).start()
    opinion.end()
    assert asked == [("app.yaml", True)]
