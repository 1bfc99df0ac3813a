# SPDX-License-Identifier: Apache-2.0
"""ARCHITECTURE.md and the documents beside it, against the files they speak of."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import disagg

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("disagg", "pools", "transport")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "configs" / "README.md"])
LIMITS = {"README.md": 160, "ARCHITECTURE.md": 200}


def rooms() -> list[str]:
    """Every folder of code."""
    return sorted(
        path.parent.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    )


@pytest.mark.parametrize("room", rooms())
def test_the_map_has_a_line_for_every_room(room: str) -> None:
    """Each room is a row of the table, once."""
    assert len(re.findall(rf"^\| `{re.escape(room)}/` \| \S.* \|$", ARCHITECTURE, re.MULTILINE)) == 1


def test_the_map_names_no_room_that_is_gone() -> None:
    """Each row of the table is a folder of code."""
    entries = re.findall(r"^\| `((?:disagg|pools|transport)[\w/]*)/` \|", ARCHITECTURE, re.MULTILINE)
    assert sorted(entries) == rooms()


@pytest.mark.parametrize("room", [room for room in rooms() if room != "disagg"])
def test_a_room_says_what_it_is_for(room: str) -> None:
    """The docstring of its `__init__.py` has two to six lines and nothing else follows it."""
    module = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(module)
    assert docstring is not None
    assert len(module.body) == 1
    assert 2 <= len([line for line in docstring.splitlines() if line.strip()]) <= 6


def test_paths_in_the_architecture_lead_somewhere() -> None:
    """Each path of a module or a folder that the page names exists."""
    named = re.findall(r"`((?:disagg|pools|transport|docs|tests|benchmarks)/[\w/.-]*)`", ARCHITECTURE)
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    """Each relative link names a file, and its fragment a heading of that file."""
    for target, fragment in re.findall(
        r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", document.read_text(encoding="utf-8")
    ):
        path = document.parent / target if target else document
        assert path.exists(), target
        assert not fragment or fragment in anchors(path), f"{target}#{fragment}"


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_documents_stay_short(name: str, limit: int) -> None:
    """README and ARCHITECTURE can be read in one go."""
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= limit


def test_changelog_has_the_version() -> None:
    """The newest entry of the changelog is the version of the code."""
    newest = re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == disagg.__version__


def anchors(path: Path) -> set[str]:
    """Fragments of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
