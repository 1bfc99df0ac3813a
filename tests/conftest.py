# SPDX-License-Identifier: Apache-2.0
"""What every run of tests writes down: how long each test took, and how many engines and applications it started.

`build/durations-<tier>.json` has them, where the tier is the folder below `tests` that was asked for; `all` is several.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections import Counter
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[1] / "build"
NUM_SLOWEST = 10


class Durations:
    """Seconds of each test by phase. Runs in the process that the user started, which hears of all tests."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._began = time.monotonic()
        self._seconds: dict[str, dict[str, float]] = {}
        self._outcomes: Counter[str] = Counter()
        self._starts = BUILD / f"starts-{tier}.log"
        BUILD.mkdir(exist_ok=True)
        self._starts.write_text("")
        os.environ["DISAGG_TEST_STARTS"] = str(self._starts)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds.setdefault(report.nodeid, {})[report.when or ""] = round(report.duration, 3)
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.outcome if report.when == "call" or report.skipped else "error"] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        found = {
            "tier": self._tier,
            "outcomes": dict(self._outcomes),
            "wall_s": round(time.monotonic() - self._began, 1),
            "cpu_s": round(sum(one.ru_utime + one.ru_stime for one in used), 1),
            "starts": self._num_starts(),
            "seconds": self._seconds,
        }
        (BUILD / f"durations-{self._tier}.json").write_text(json.dumps(found, indent=1) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        whole = {test: sum(phases.values()) for test, phases in self._seconds.items()}
        slowest = sorted(whole.items(), key=lambda pair: -pair[1])[:NUM_SLOWEST]
        terminalreporter.section(f"{len(slowest)} slowest of {len(whole)}, fixtures included")
        for test, seconds in slowest:
            terminalreporter.write_line(f"{seconds:7.2f} s  {test}")
        starts = ", ".join(f"{number} of {what}" for what, number in sorted(self._num_starts().items()))
        terminalreporter.write_line(f"starts: {starts or 'none'}; build/durations-{self._tier}.json has all")

    def _num_starts(self) -> dict[str, int]:
        return dict(Counter(self._starts.read_text().splitlines()))


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist report to the process that started them.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(_tier(config.args)), "durations")


def _tier(arguments: list[str]) -> str:
    """The folder below `tests` that all arguments are in."""
    tests = Path(__file__).resolve().parent
    found = set()
    for argument in arguments:
        path = Path(argument.split("::")[0]).resolve()
        found.add(path.relative_to(tests).parts[0] if path.is_relative_to(tests) and path != tests else "all")
    return found.pop() if len(found) == 1 else "all"
