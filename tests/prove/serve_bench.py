# SPDX-License-Identifier: Apache-2.0
"""Line 7: what the gateway costs, in one run against calling by hand and against the Rust router."""

from __future__ import annotations

from benchmarks.__main__ import run
from tests.prove.report import Row


def bench() -> list[Row]:
    return [Row(7, row["what"], row["figure"], row["bound"], row["holds"]) for row in run(quick=False)["rows"]]
