# SPDX-License-Identifier: Apache-2.0
"""Line 7: each import contract, broken on purpose in a copy of the packages."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.prove.report import Row
from tests.unit.test_contracts import CONTRACTS, FAULTS, broken, copied, fault


def contracts() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        whole = broken(tree)
        rows = [Row(7, "contracts that hold", f"{len(CONTRACTS) - len(whole)}", f"{len(CONTRACTS)}", not whole)]
        for begin, module, line in FAULTS:
            with fault(tree / module, line):
                caught = any(name.startswith(begin) for name in broken(tree))
            rows.append(Row(7, f"{module}: {line}", "caught" if caught else "not noticed", "caught", caught))
    without = [name for name in CONTRACTS if not any(name.startswith(begin) for begin, *_ in FAULTS)]
    rows.append(Row(7, "contracts that nothing was broken for", f"{len(without)}", "0", not without))
    return rows
