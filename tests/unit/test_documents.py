# SPDX-License-Identifier: Apache-2.0
"""What documents show runs, and the tests that they name exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_the_example_of_the_fake_engine_runs() -> None:
    """The one on the page about testing, as it stands there."""
    [example] = _PYTHON.findall((ROOT / "docs" / "testing.md").read_text())
    subprocess.run([sys.executable, "-c", example], check=True, cwd=ROOT, timeout=60)


def test_facts_of_removed_tests_are_proved_somewhere() -> None:
    """Each test that the list names as the new place of a fact is a test."""
    rows = re.findall(r"^\| `.*\|([^|]*)\|$", (ROOT / "tests" / "MERGED.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"\btest_\w+(?!\w|\.py)", row)}
    sources = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) >= 9
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []
