# SPDX-License-Identifier: Apache-2.0
"""Line 5: the GPU set loads, and the check notices the wheel of Mooncake that did not."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from scripts.check_gpu_set import OUT
from tests.prove.report import ROOT, Row

LINE = 5
NEW, OLD = "mooncake-transfer-engine-cuda13", "mooncake-transfer-engine==0.3.13"
LIBRARY = "libcudart.so.12"


def gpu_set() -> list[Row]:
    """Run the check as `make check-gpu-set` does, on the lock and on the lock with the old wheel put back."""
    status, found = _check()
    old_status, old = _check("--replace", f"{NEW}={OLD}")
    missing = sorted({f"{one['wheel']}: {one['library']}" for one in old["missing"]})
    named = [one for one in old["missing"] if one["library"] == LIBRARY and one["wheel"] == OLD.partition("==")[0]]
    size = f"{found['num_bytes'] / 2**30:.1f} GiB of wheels"
    return [
        Row(LINE, "libraries that the GPU set misses", str(len(found["missing"])), "0", not found["missing"]),
        Row(LINE, "requirements that its wheels state and it does not meet", *_none(found["unmet"])),
        Row(LINE, f"make check-gpu-set, {size}", f"exit {status}", "exit 0", status == 0),
        Row(LINE, f"the same with {OLD}", f"exit {old_status}", "exit 1", old_status == 1),
        Row(LINE, "what it names then", "; ".join(missing), f"{LIBRARY} alone", len(missing) == 1 and bool(named)),
    ]


def _check(*options: str) -> tuple[int, dict[str, Any]]:
    """Exit status of the check, and what it wrote down."""
    OUT.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "scripts/check_gpu_set.py", *options], cwd=ROOT, check=False)
    return done.returncode, json.loads(OUT.read_text())


def _none(found: list[Any]) -> tuple[str, str, bool]:
    return str(len(found)), "0", not found
