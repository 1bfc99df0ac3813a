# SPDX-License-Identifier: Apache-2.0
"""What documents show runs, the tests that they name exist, and what they list is all there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TIERS = {"fs": "files", "resp": "Redis", "s3": "S3"}
"""Words of the index of configs for kinds of L2."""
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


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_each_config_has_its_row(file: Path) -> None:
    """The index of configs has a row for it, which says its pools, GPUs, transport, tiers and what is in front."""
    index = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    [row] = [line for line in index.splitlines() if line.startswith(f"| [{file.name}]({file.name}) |")]
    told = [cell.strip() for cell in row.strip("|").split("|")]
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    [application] = config["applications"]
    args, sizes = application["args"], {pool["name"]: pool["num_replicas"] for pool in application["deployments"]}
    gpus = args["model"]["engine_kwargs"].get("tensor_parallel_size", 1) if args["platform"] == "cuda" else "none"
    mode = args["transport"].get("mode")
    haproxy = "RAY_SERVE_ENABLE_HA_PROXY" in str(config.get("controller_options"))
    tiers = ["host memory"] if "offload" in args else []
    if "shared_cache" in args:
        tiers += ["LMCache", *(TIERS[l2["type"]] for l2 in args["shared_cache"]["server"].get("l2", ()))]
    assert told[2:] == [
        f"{sizes['prefill']}, {sizes['decode']}",
        str(gpus),
        f"`{args['transport']['type']}`" + (f", `mode: {mode}`" if mode else ""),
        ", ".join(tiers) or "none",
        "HAProxy" if haproxy else "Serve's proxy",
    ]


def test_the_index_names_no_config_that_is_gone() -> None:
    """Each row of it is a file."""
    index = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[([\w.-]+)\]", index, re.MULTILINE)) == [file.name for file in CONFIGS]
