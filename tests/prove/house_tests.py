# SPDX-License-Identifier: Apache-2.0
"""Line 1: `make test` in a clean clone, how long it takes, and that it has not lost tests on the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.prove.report import Row
from tests.prove.serve_clone import clean_env, clone

LINE = 1
BOUND_MIN = 20.0
BOUND_CORES = 2
NUM_SLOWEST = 10
WERE: Mapping[str, int] = {"unit": 2335, "engine": 296, "e2e": 32}
"""Tests of each tier before the tier of components was taken out of that of engines."""
TIERS: Mapping[str, tuple[str, ...]] = {"unit": ("unit",), "engine": ("component", "engine"), "e2e": ("e2e",)}
_REMOVED = re.compile(r"^\| `(?:tests/)?(unit|component|engine|e2e)/[^`]*`(?: \((\d+) cases)?")


def make_test() -> list[Row]:
    """Run it on the first two cores that this process may use, and read what it wrote down."""
    cores = sorted(os.sched_getaffinity(0))[:BOUND_CORES]
    with clone() as where:
        started = time.monotonic()
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), "make", "test"]
        done = subprocess.run(command, cwd=where, env=clean_env(), check=False)
        took_min = (time.monotonic() - started) / 60
        merged = removed((where / "tests" / "MERGED.md").read_text())
        found = written(where / "build")
    for test, seconds in slowest(found):
        print(f"    {seconds:7.1f} s  {test}")
    for tier, one in found.items():
        print(f"    {tier}: {one['outcomes']} in {one['wall_s']} s, started {one['starts'] or 'nothing'}")
    wall = Row(
        LINE,
        f"make test in a clean clone on {len(cores)} cores",
        f"exit {done.returncode} after {took_min:.1f} min",
        f"exit 0 within {BOUND_MIN:g} min",
        done.returncode == 0 and took_min <= BOUND_MIN,
    )
    return [wall, *counts(found, merged)]


def written(build: Path) -> dict[str, dict[str, Any]]:
    """What `tests/conftest.py` wrote of each tier; a tier that did not run is missing."""
    names = [tier for tiers in TIERS.values() for tier in tiers]
    files = {name: build / f"durations-{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def counts(found: Mapping[str, Mapping[str, Any]], merged: Mapping[str, int]) -> list[Row]:
    """A row a former tier: tests that passed there now, and how many it must have."""
    rows = []
    for tier, number in WERE.items():
        wanted = number - sum(merged.get(one, 0) for one in TIERS[tier])
        passed = sum(found.get(one, {}).get("outcomes", {}).get("passed", 0) for one in TIERS[tier])
        what = f"{' and '.join(TIERS[tier])} tests that passed"
        listed = f" - {number - wanted} in tests/MERGED.md" if wanted < number else ""
        rows.append(Row(LINE, what, str(passed), f"at least {number}{listed}", passed >= wanted))
    return rows


def removed(page: str) -> dict[str, int]:
    """Tests that tests/MERGED.md lists, by tier; a row is one test where it does not say how many cases it had."""
    found: dict[str, int] = {}
    for line in page.splitlines():
        if row := _REMOVED.match(line):
            found[row[1]] = found.get(row[1], 0) + int(row[2] or 1)
    return found


def slowest(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float]]:
    """The slowest tests of all tiers with the seconds that they and their fixtures took."""
    seconds = {test: sum(phases.values()) for one in found.values() for test, phases in one["seconds"].items()}
    return sorted(seconds.items(), key=lambda pair: -pair[1])[:NUM_SLOWEST]
