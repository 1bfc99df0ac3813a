# SPDX-License-Identifier: Apache-2.0
"""Line 9: the pages name every metric, every config field and every route."""

from __future__ import annotations

import subprocess
import sys

from tests.prove.report import ROOT, Row

TESTS = (
    "tests/unit/disagg/pages/test_api.py",
    "tests/unit/disagg/pages/test_metrics.py",
    "tests/unit/disagg/test_config.py",
    "tests/unit/test_architecture.py",
)


def documented() -> list[Row]:
    check = subprocess.run([sys.executable, "-m", "disagg.pages.generate", "--check"], cwd=ROOT, check=False)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, check=False)
    return [
        Row(
            9,
            "docs/api.md, docs/configuration.md and docs/metrics.md are current",
            f"exit {check.returncode}",
            "exit 0",
            check.returncode == 0,
        ),
        Row(
            9,
            "tests that every metric, field and route is named",
            f"exit {tests.returncode}",
            "exit 0",
            tests.returncode == 0,
        ),
    ]
