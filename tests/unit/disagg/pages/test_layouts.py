# SPDX-License-Identifier: Apache-2.0
"""The section of docs/tiers.md about KV layouts against the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from disagg.pages import layouts
from transport.kv_layouts import LAYOUTS
from transport.parts import PARTS

TEXT = (Path(__file__).parents[4] / layouts.PAGE).read_text(encoding="utf-8")


def test_section_is_current() -> None:
    """docs/tiers.md has the table as it is."""
    assert layouts.page(TEXT) == TEXT, "run `python -m disagg.pages.generate`"


def test_every_part_and_layout_has_its_place() -> None:
    """Each part is a row of both platforms, and each layout is explained."""
    section = layouts.section()
    for part in PARTS:
        assert section.count(f"| {part.name} |") == 2
    for layout in LAYOUTS.values():
        assert f"| {layout.title} | {layout.groups} | {layout.models} |" in section


def test_reasons_stand_below_the_tables() -> None:
    """A cell that says more than yes or no has the number of a sentence, with the action and the words in the log."""
    section = layouts.section()
    tables, _, reasons = section.partition("\n1. ")
    numbers = {int(number) for number in re.findall(r"\((\d+)\) \|", tables)}
    assert numbers == set(range(1, 1 + len(reasons.splitlines())))
    assert 'In vLLM\'s log: "engine-driven transfer does not support multiple KV transfer groups".' in section


def test_a_page_without_the_marks_is_refused() -> None:
    """Nothing is written into a page that does not say where."""
    with pytest.raises(ValueError, match="lacks the marks"):
        layouts.page("# Tiers\n")
