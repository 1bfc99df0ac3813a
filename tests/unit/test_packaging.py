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
