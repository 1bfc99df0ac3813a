# SPDX-License-Identifier: Apache-2.0
"""Each example runs as it is against a real application."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.stack import ROOT, Stack

EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path, real_stack: Stack) -> None:
    """The example ends with exit code 0."""
    command = ["bash", str(example)] if example.suffix == ".sh" else [sys.executable, str(example)]
    environment = {**os.environ, "DISAGG_URL": real_stack.url, "DISAGG_API_KEY": real_stack.admin_key}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
