# SPDX-License-Identifier: Apache-2.0
"""Rows of a proof: what was looked at, the figure, the bound, and whether it holds."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One figure of a proof."""

    line: int
    what: str
    figure: str
    bound: str
    holds: bool

    def text(self) -> str:
        return f"{self.line:>2}  {'holds' if self.holds else 'FAILS':<6} {self.what:<58} {self.figure:<34} {self.bound}"


def main(name: str, lines: Mapping[int, str]) -> int:
    """Run the lines that the command line asks for, print a row each, write `build/prove-<name>.json`.

    Args:
        lines: `module:function` of each line; the function takes nothing and returns its rows.
    """
    parser = argparse.ArgumentParser(description=f"prove-{name}: runs what has to be shown and prints a row each")
    parser.add_argument("--line", type=int, choices=sorted(lines), help="only this line")
    chosen = parser.parse_args().line
    rows: list[Row] = []
    for number in [chosen] if chosen else sorted(lines):
        started = time.monotonic()
        try:
            module, _, function = lines[number].partition(":")
            found = getattr(importlib.import_module(module), function)()
        except Exception as exc:
            traceback.print_exc()
            found = [Row(number, "the line could not be run", f"{type(exc).__name__}: {exc}"[:120], "", False)]
        rows += found
        for row in found:
            print(row.text(), flush=True)
        print(f"    line {number} took {time.monotonic() - started:.0f} s", flush=True)
    out = ROOT / "build" / (f"prove-{name}-line-{chosen}.json" if chosen else f"prove-{name}.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    failed = [row for row in rows if not row.holds]
    print(f"{len(rows) - len(failed)} rows hold, {len(failed)} do not; {out.relative_to(ROOT)}", file=sys.stderr)
    return 1 if failed else 0
