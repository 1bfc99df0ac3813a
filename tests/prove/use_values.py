# SPDX-License-Identifier: Apache-2.0
"""Line 7: `disagg check` against vLLM's own argument classes, on files as users write them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.prove.report import ROOT, Row
from tests.support.engine_values import GPU_MODEL, RIGHT, RIGHT_ON_CPU, WRONG, WRONG_TOGETHER, Case, File, files
from tests.support.stack import tiny_model

LINE = 7
MIN_WRONG = 60
MIN_ARGUMENTS = 40
MIN_RIGHT = 60


@dataclass(frozen=True)
class Checked:
    """One file and what the command said of it."""

    file: File
    report: dict[str, Any]
    seconds: float

    def refused(self) -> set[str]:
        return {problem["path"] for problem in self.report["problems"] if problem["severity"] == "error"}


def engine_values() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="disagg-values-") as directory:
        where, tiny = Path(directory), str(tiny_model())
        wrong = _checked(WRONG, "cuda", GPU_MODEL, where)
        right = _checked(RIGHT, "cuda", GPU_MODEL, where)
        right_here = _checked(RIGHT_ON_CPU, "cpu", tiny, where)
        together = _checked(WRONG_TOGETHER, "cpu", tiny, where)
    everything = [*wrong, *right, *right_here, *together]
    seconds = [checked.seconds for checked in everything]
    return [
        *_wrong_rows(wrong, "wrong values"),
        *_right_rows([*right, *right_here]),
        _together_row(together),
        _asked_row(everything),
        Row(LINE, "one check", f"{min(seconds):.1f} to {max(seconds):.1f} s", "printed", True),
    ]


def _checked(cases: Sequence[Case], platform: Literal["cpu", "cuda"], source: str, where: Path) -> list[Checked]:
    found = []
    for index, file in enumerate(files(cases, platform=platform, source=source)):
        path = file.written(where / f"{platform}-{index}.yaml")
        started = time.monotonic()
        said = _check(path)
        found.append(Checked(file, json.loads(said.stdout), time.monotonic() - started))
    return found


def _check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "disagg.cli.main", "check", "--json", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def _wrong_rows(found: list[Checked], what: str) -> list[Row]:
    cases = [case for checked in found for case in checked.file.cases]
    missed = [path for checked in found for path in checked.file.paths if path not in checked.refused()]
    blamed = [path for checked in found for path in checked.refused() - set(checked.file.paths)]
    for path in missed:
        print(f"    not refused: {path}")
    for path in blamed:
        print(f"    refused beside them: {path}")
    arguments = {case.argument for case in cases}
    enough = len(cases) >= MIN_WRONG and len(arguments) >= MIN_ARGUMENTS
    return [
        Row(
            LINE,
            f"{what} refused, each with its path",
            f"{len(cases) - len(missed)} of {len(cases)}, of {len(arguments)} arguments",
            f"all, of at least {MIN_WRONG}, of {MIN_ARGUMENTS}",
            enough and not missed,
        ),
        Row(LINE, "other problems in these files", str(len(blamed)), "0", not blamed),
    ]


def _right_rows(found: list[Checked]) -> list[Row]:
    cases = [case for checked in found for case in checked.file.cases]
    refused = [problem for checked in found for problem in checked.refused()]
    for path in refused:
        print(f"    refused: {path}")
    holds = not refused and len(cases) >= MIN_RIGHT and all(checked.report["ok"] for checked in found)
    return [Row(LINE, "right values refused", f"{len(refused)} of {len(cases)}", f"0 of at least {MIN_RIGHT}", holds)]


def _together_row(found: list[Checked]) -> Row:
    cases = [case for checked in found for case in checked.file.cases]
    good = [checked.refused() == set(checked.file.paths) for checked in found]
    what = "wrong with this model and device, each with its path"
    return Row(LINE, what, f"{len(cases)} in {len(found)} file(s)", "all", bool(found) and all(good))


def _asked_row(found: list[Checked]) -> Row:
    """On CPUs all was judged; of GPUs, which are not here, the report says what was not."""
    wrong = [
        checked.report["not_checked"]
        for checked in found
        if (checked.report["not_checked"] is None) == (checked.report["args"]["platform"] == "cuda")
    ]
    return Row(LINE, "files whose report hides what was not judged", str(len(wrong)), "0", not wrong)
