# SPDX-License-Identifier: Apache-2.0
"""Line 2: what the house does is what was done before it, at the same cost.

The behaviour is what the earlier proofs look at. The cost is that of the gateway and HAProxy over fake engines, taken
in turns with the commit before the house, in one run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.prove.report import ROOT, Row

BEFORE = "1e155f5"
"""The last commit before the rooms."""
TURNS = 5
MAX_RATIO = 1.02
STREAMS = ("16", "100")
PROOFS: list[tuple[str, str | None]] = [
    ("serve", None),
    ("tiers", None),
    *(("faults", str(line)) for line in range(2, 10)),
]


def same_behaviour_and_cost() -> list[Row]:
    return [*cost(), *(row for name, line in PROOFS for row in proof(name, line))]


def proof(name: str, line: str | None) -> list[Row]:
    """One earlier proof, run whole; what does not hold has a row of its own."""
    argv = ["make", f"prove-{name}"] + ([] if line is None else [f"LINE={line}"])
    out = ROOT / "build" / (f"prove-{name}.json" if line is None else f"prove-{name}-line-{line}.json")
    out.unlink(missing_ok=True)
    subprocess.run(argv, cwd=ROOT, stdout=sys.stderr, check=False)
    if not out.exists():
        return [Row(2, " ".join(argv), "it wrote no rows", "all hold", False)]
    found = json.loads(out.read_text())
    failed = [row for row in found if not row["holds"]]
    whole = Row(2, " ".join(argv), f"{len(found) - len(failed)} of {len(found)} rows hold", "all", not failed)
    return [whole, *(Row(2, f"  {row['what']}", row["figure"], row["bound"], False) for row in failed)]


def cost() -> list[Row]:
    """CPU per token and per request, before and after, in turns."""
    before = checkout(BEFORE)
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for turn in range(TURNS):
        order = [before, ROOT] if turn % 2 else [ROOT, before]
        found = {tree: measured(tree) for tree in order}
        for streams in STREAMS:
            for key in ("us_per_token", "us_per_request"):
                pair = tuple(found[tree]["disagg-haproxy"][streams]["median"][key] for tree in (before, ROOT))
                ratios.setdefault((streams, key), []).append((pair[0], pair[1]))
    return [judged(streams, key, pairs) for (streams, key), pairs in ratios.items()]


def judged(streams: str, key: str, pairs: list[tuple[float, float]]) -> Row:
    """One figure over all turns: the ratio of the medians, and the least and greatest of one turn."""
    then, now = (statistics.median(values) for values in zip(*pairs, strict=True))
    each = sorted(after / before for before, after in pairs)
    ratio = now / then
    figure = f"{ratio:.3f} ({then:.1f} to {now:.1f} µs; {each[0]:.2f} to {each[-1]:.2f})"
    what = f"CPU {key.removeprefix('us_').replace('_', ' ')}, {streams} streams"
    return Row(2, what, figure, f"at most {MAX_RATIO}", ratio <= MAX_RATIO)


def measured(tree: Path) -> dict[str, Any]:
    """One run of the benchmark of a tree, with that tree's code everywhere."""
    out = ROOT / "build" / "house-bench.json"
    argv = [sys.executable, "-m", "benchmarks.hop", "--fronts", "disagg-haproxy", "--streams", *STREAMS]
    argv += ["--repeats", "1", "--output", str(out)]
    subprocess.run(argv, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=sys.stderr, check=True)
    results: dict[str, Any] = json.loads(out.read_text())["results"]
    return results


def checkout(commit: str) -> Path:
    """The files of a commit in a folder of their own."""
    tree = ROOT / "build" / f"before-{commit}"
    if not tree.exists():
        subprocess.run(["git", "clone", "-q", "--shared", "--no-checkout", str(ROOT), str(tree)], check=True)
        subprocess.run(["git", "checkout", "-q", commit], cwd=tree, check=True)
    return tree
