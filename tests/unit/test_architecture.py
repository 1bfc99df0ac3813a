# SPDX-License-Identifier: Apache-2.0
"""ARCHITECTURE.md and the documents beside it, against the files they speak of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import disagg

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("disagg", "pools", "transport")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LIMITS = {"README.md": 160, "ARCHITECTURE.md": 320}


def modules() -> list[str]:
    """Every module that holds code; a package marker with nothing but its licence line has nothing to be said of it."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    with_code = [path for path in files if path.name != "__init__.py" or path.read_text().count("\n") > 1]
    return sorted(path.relative_to(ROOT).as_posix() for path in with_code)


@pytest.mark.parametrize("module", modules())
def test_architecture_has_a_sentence_for_every_module(module: str) -> None:
    """Each module is an entry of the list, once."""
    assert len(re.findall(rf"^- `{re.escape(module)}`: \S.*\.$", ARCHITECTURE, re.MULTILINE)) == 1


def test_architecture_names_no_module_that_is_gone() -> None:
    """Each entry of the list is a file."""
    entries = re.findall(r"^- `([\w/]+\.py)`:", ARCHITECTURE, re.MULTILINE)
    assert sorted(entries) == modules()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
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
