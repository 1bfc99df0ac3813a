# SPDX-License-Identifier: Apache-2.0
"""Each example runs as it is against a real application; the one that scales, where a new engine costs little."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.stack import ROOT, Stack

EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh"))
SCALES = "scale_pools.py"


@pytest.mark.parametrize("example", [path for path in EXAMPLES if path.name != SCALES], ids=lambda path: path.name)
def test_example_runs(example: Path, real_stack: Stack) -> None:
    """The example ends with exit code 0."""
    run(example, real_stack)


def test_the_example_that_scales(fake_haproxy_stack: Stack) -> None:
    """It adds a replica, takes it away again, and ends with exit code 0."""
    run(ROOT / "examples" / SCALES, fake_haproxy_stack)


def run(example: Path, stack: Stack) -> None:
    command = ["bash", str(example)] if example.suffix == ".sh" else [sys.executable, str(example)]
    environment = {**os.environ, "DISAGG_URL": stack.url, "DISAGG_API_KEY": stack.admin_key}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
