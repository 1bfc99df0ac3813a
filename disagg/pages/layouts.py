# SPDX-License-Identifier: Apache-2.0
"""The section of docs/tiers.md about which models work with what, from `transport.parts`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from transport.facts import Platform
from transport.kv_layouts import LAYOUTS, Known
from transport.parts import PARTS

PAGE = Path("docs/tiers.md")
BEGIN = "<!-- Written by `python -m disagg.pages.generate` from `transport.parts`. Do not edit it by hand. -->"
END = "<!-- The end of what is written. -->"

_CELLS = {"works": "yes", "partly": "in part", "refused": "no", "unseen": "not seen"}


def page(text: str) -> str:
    """The page with its section written anew.

    Args:
        text: the page as it is, with both marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks the marks between which the table of layouts is written")
    return f"{before}{BEGIN}\n\n{section()}\n{END}{after}"


def section() -> str:
    """Layouts, a table for each platform, and the reasons."""
    reasons: list[str] = []
    lines = ["| layout | what vLLM keeps | models |", "|---|---|---|"]
    lines += [f"| {one.title} | {one.groups} | {one.models} |" for one in LAYOUTS.values()]
    for platform in get_args(Platform):
        lines += ["", f"`platform: {platform}`:", "", *_table(platform, reasons)]
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join([*lines, ""])


def _table(platform: Platform, reasons: list[str]) -> list[str]:
    columns = list(LAYOUTS)
    lines = [f"| | {' | '.join(LAYOUTS[layout].title for layout in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for part in PARTS:
        cells = [_cell(part.layouts[platform][layout], reasons) for layout in columns]
        lines.append(f"| {part.name} | {' | '.join(cells)} |")
    return lines


def _cell(known: Known, reasons: list[str]) -> str:
    if not known.message:
        return _CELLS[known.state]
    sentences = [_sentence(text) for text in (known.message, known.action) if text]
    if known.error:
        sentences.append(f'In vLLM\'s log: "{known.error}".')
    reason = " ".join(sentences)
    if reason not in reasons:
        reasons.append(reason)
    return f"{_CELLS[known.state]} ({reasons.index(reason) + 1})"


def _sentence(text: str) -> str:
    begins = text if text.startswith("vLLM") else f"{text[0].upper()}{text[1:]}"
    return f"{begins}."
