# SPDX-License-Identifier: Apache-2.0
"""What a start that goes wrong says, and when it is given up."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path

import pytest

from disagg.cli.starting import Starting
from pools.errors import EngineStartError
from pools.replica.start_failure import StartFailure, root_cause

PREFIX = "\x1b[36m(ServeReplica:disagg:prefill pid=7)\x1b[0m ERROR 2026-11-29 01:00:00,000 disagg_prefill abc -- "
OWN_RAY = "2026-11-29 01:00:00,000\tINFO worker.py:2038 -- Started a local Ray instance."
UNPLACED = (
    "(ServeController pid=7) WARNING -- Deployment 'decode' in application 'disagg' has 3 replicas that have taken "
    "more than 30s to be scheduled. This may be due to waiting for the cluster to auto-scale or for a runtime "
    "environment to be installed. Resources required for each replica: {required}, total resources available: "
    "{free}. Use `ray status` for more details."
)
TOO_LARGE = UNPLACED.replace("{required}", '{"CPU": 8.0}').replace("{free}", '{"CPU": 2.0}')
FITS = UNPLACED.replace("{required}", '{"CPU": 0.5}').replace("{free}", '{"CPU": 14.0}')
BUNDLES = UNPLACED.replace("{required}", '[{"CPU": 4.0}, {"CPU": 4.0, "GPU": 1}]').replace("{free}", "{}")


def failed(pool: str = "prefill", reason: str = "ValueError: no") -> str:
    return PREFIX + StartFailure(pool, "abc", reason).line()


def test_each_failure_is_told_and_the_last_one_ends_the_start() -> None:
    """At once, with pool, replica and root cause."""
    starting = Starting(max_failures=3)
    assert starting.feed(failed()) == "prefill replica abc did not start (1): ValueError: no"
    assert starting.feed(failed("decode")) == "decode replica abc did not start (2): ValueError: no"
    assert starting.hopeless is None and starting.told
    starting.feed(failed(reason="OSError: later"))
    assert starting.hopeless == "3 replicas did not start, the last one of prefill: OSError: later"


def test_other_lines_say_nothing() -> None:
    """Neither the log of engines nor a line that is cut."""
    starting = Starting(max_failures=1)
    for line in ("", "INFO engine started", failed()[:-9], "disagg: a replica did not start: []"):
        assert starting.feed(line) is None
    assert starting.hopeless is None


def test_what_cannot_be_placed() -> None:
    """Told once, and given up when Serve says so again."""
    starting = Starting(max_failures=3)
    starting.feed(OWN_RAY)
    said = starting.feed(TOO_LARGE)
    assert said == "3 replica(s) of decode cannot be placed: each needs 8 CPU, free in the cluster is 2 CPU"
    assert starting.hopeless is None
    assert starting.feed(TOO_LARGE) is None
    assert starting.hopeless == said


@pytest.mark.parametrize("line", [FITS, BUNDLES])
def test_what_may_find_a_place_is_waited_for(line: str) -> None:
    """Serve says the same of processes that start slowly; of placement groups it does not say what is free."""
    starting = Starting(max_failures=3)
    starting.feed(OWN_RAY)
    assert "have no place yet: each needs" in (starting.feed(line) or "")
    for _ in range(9):
        starting.feed(line)
    assert starting.hopeless is None


def test_the_gateway_knows_what_is_free() -> None:
    """Of placement groups, too: with its word the second warning ends the start."""
    starting = Starting(max_failures=3)
    starting.feed(OWN_RAY)
    starting.feed(BUNDLES)
    starting.no_room("decode")
    starting.feed(BUNDLES)
    assert starting.hopeless == "3 replica(s) of decode have no place yet: each needs 8 CPU, 1 GPU"


def test_another_cluster_may_grow() -> None:
    """Ray that ran before may be one that adds nodes, in minutes."""
    starting = Starting(max_failures=3)
    for _ in range(9):
        starting.feed(TOO_LARGE)
    assert starting.hopeless is None and starting.told


def test_memory_and_what_serve_gives_up() -> None:
    """Ray's own ending of processes is told once; Serve's verdict ends the start with the last reason."""
    starting = Starting(max_failures=9)
    line = "(raylet) 1 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed"
    assert "out of memory" in (starting.feed(line) or "")
    assert starting.feed(line) is None
    starting.feed(failed("decode"))
    starting.feed("ERROR -- Failed to update the deployments ['decode'].")
    assert starting.hopeless == "the application did not start: decode: ValueError: no"


def chain(*errors: BaseException) -> BaseException:
    for outer, inner in pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            chain(EngineStartError("vLLM did not start: x"), ValueError("max_model_len\n 9")),
            "ValueError: max_model_len 9",
        ),
        (chain(EngineStartError("a"), EngineStartError("no LMCache")), "EngineStartError: no LMCache"),
        (KeyError(), "KeyError"),
        (
            RuntimeError(
                "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}"
            ),
            "EngineCore was killed (signal 9), as the system does when memory runs out",
        ),
        (
            RuntimeError("Failed core proc(s): {'EngineCore_DP0': -11}"),
            f"EngineCore was ended by signal 11 ({signal.Signals.SIGSEGV.name})",
        ),
    ],
)
def test_the_root_cause_without_notes(error: BaseException, words: str, tmp_path: Path) -> None:
    """The innermost error, or the signal that ended EngineCore."""
    assert root_cause(error, None) == root_cause(error, tmp_path / "nothing") == words


def test_the_first_note_is_the_root(tmp_path: Path) -> None:
    """A worker's failure makes EngineCore fail, and EngineCore's the replica."""
    notes = tmp_path / "causes"
    notes.write_text("\nValueError: the root\nRuntimeError: Engine core failed\n")
    assert root_cause(RuntimeError("See root cause above"), notes) == "ValueError: the root"
