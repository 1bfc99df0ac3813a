# SPDX-License-Identifier: Apache-2.0
"""The import contracts of pyproject.toml, each broken on purpose in a copy of the packages: each is noticed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINTER = Path(sys.executable).with_name("lint-imports")
CONTRACTS = [
    contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
]
FAULTS: list[tuple[str, str, str]] = [
    ("disagg, then pools, then transport", "transport/launch.py", "import pools.errors"),
    ("vLLM and torch only", "pools/plan/launch.py", "import vllm"),
    ("Ray only", "disagg/gateway/app.py", "import ray"),
    ("Web frameworks only", "disagg/routing/views.py", "import starlette"),
    ("httpx only", "disagg/gateway/app.py", "import httpx"),
    ("The base install", "disagg/sdk/client.py", "import disagg.gateway.app"),
    ("The base install", "disagg/advice/machine.py", "import psutil"),
    ("The base install", "disagg/key_lines.py", "import msgspec"),
    ("The base install", "disagg/cli/status.py", "import disagg.cli.serving"),
    ("disagg: commands over", "disagg/config.py", "import disagg.sdk.client"),
    ("Routing decides", "disagg/routing/least_loaded.py", "import disagg.gateway.replicas.membership"),
    ("Routing decides", "disagg/routing/least_loaded.py", "import ray"),
    ("Observability is imported", "disagg/observability/metrics.py", "import disagg.routing.views"),
    ("Advice never reaches", "disagg/advice/check.py", "import disagg.gateway.front.edge"),
    ("The gateway's rooms", "disagg/gateway/replicas/membership.py", "import disagg.gateway.handoff.handoff"),
    ("The pools' rooms", "pools/plan/launch.py", "import pools.replica.spec"),
    ("Connectors in an engine", "transport/in_engine/nixl/connector.py", "import transport.in_engine.lmcache.sink"),
    ("Descriptors of transports", "transport/nixl/descriptor.py", "import transport.mooncake.descriptor"),
    ("What runs inside an engine", "pools/plan/launch.py", "import transport.in_engine.protocols"),
]
"""Beginning of a contract's name, a module, and an import in it that breaks the contract."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the three packages and their contracts."""
    return copied(tmp_path_factory.mktemp("tree"))


def copied(tree: Path) -> Path:
    """The three packages and their contracts, copied to a folder."""
    for package in ("disagg", "pools", "transport"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


@contextmanager
def fault(path: Path, line: str) -> Iterator[None]:
    """The module with one more import, until the end of the block."""
    whole = path.read_text(encoding="utf-8")
    path.write_text(f"{whole}\n\n{line}\n", encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(whole, encoding="utf-8")


def broken(tree: Path) -> set[str]:
    """Names of the contracts that do not hold in a tree."""
    found = subprocess.run(
        [LINTER, "--no-cache"],
        cwd=tree,
        env={**os.environ, "COLUMNS": "400", "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = dict(re.findall(r"^(.+) (KEPT|BROKEN)\b", found.stdout, re.MULTILINE))
    assert set(said) == set(CONTRACTS), found.stdout + found.stderr
    assert found.returncode == int("BROKEN" in said.values())
    return {name for name, verdict in said.items() if verdict == "BROKEN"}


def test_every_contract_has_a_fault() -> None:
    """Whoever adds a contract shows that it can be broken."""
    without = [name for name in CONTRACTS if not any(name.startswith(begin) for begin, *_ in FAULTS)]
    assert not without


@pytest.mark.parametrize(("contract", "module", "line"), FAULTS, ids=[f"{m}: {line}" for _, m, line in FAULTS])
def test_a_broken_contract_is_noticed(tree: Path, contract: str, module: str, line: str) -> None:
    """One import against a contract fails the check, which names that contract."""
    (name,) = [name for name in CONTRACTS if name.startswith(contract)]
    with fault(tree / module, line):
        assert name in broken(tree)


def test_all_hold_without_a_fault(tree: Path) -> None:
    """The copy itself breaks none, so that each fault above is what is noticed."""
    assert not broken(tree)
