# SPDX-License-Identifier: Apache-2.0
"""The rows that every line with a load prints: requests, failed, wrong, worst gap, time to the first good answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.prove.report import ROOT, Row
from tests.support.faults import Load, Reference
from tests.support.stack import Stack
from tests.support.tiers import balanced, settled_books

CONFIG = ROOT / "configs" / "quickstart.yaml"
SHOWN = 8
"""Failed and wrong answers that are printed whole."""


def room(config: dict[str, Any]) -> None:
    """A change of a config file: four engines and two gateways, or replicas to scale up to, fit on two cores."""
    config["applications"][0]["args"]["cpu"] = {"num_cpus": 0.25}


def judged(
    line: int,
    load: Load,
    *,
    marks: Sequence[float] = (),
    at_least: int = 1,
    max_gap_s: float | None = None,
    max_first_good_s: float | None = None,
    what: str = "",
) -> list[Row]:
    """Rows over all that a load has heard; call it after the load has stopped.

    Args:
        marks: times of the faults; the worst time from one of them to the first good answer is printed.
        at_least: requests that must have been answered.
        max_gap_s, max_first_good_s: bounds; None prints the figure alone.
        what: put before each row's name.
    """
    for problem in [*load.failed[:SHOWN], *load.wrong[:SHOWN]]:
        print(f"    {problem[:400]}")
    number, failed, wrong = len(load.heard), len(load.failed), len(load.wrong)
    gap = load.worst_gap()
    good = [load.good_after(mark) for mark in marks]
    first_good = None if not good or None in good else max(s for s in good if s is not None)
    first_text = [s for mark in marks if (s := load.first_text_after(mark)) is not None]
    shown_good = "none" if first_good is None else f"{first_good:.2f} s, its first text {max(first_text):.2f} s"
    name = f"{what}: " if what else ""
    return [
        Row(line, f"{name}requests", str(number), f"at least {at_least}", number >= at_least),
        Row(line, f"{name}failed", f"{failed} of {number}", "0", failed == 0),
        Row(line, f"{name}wrong tokens", f"{wrong} of {number}", "0", wrong == 0),
        Row(
            line,
            f"{name}worst gap in a stream",
            f"{gap:.2f} s; first text {load.worst_first():.2f} s",
            "printed" if max_gap_s is None else f"{max_gap_s:.2f} s",
            max_gap_s is None or gap <= max_gap_s,
        ),
        Row(
            line,
            f"{name}first good answer sent after a fault, worst",
            shown_good,
            "printed" if max_first_good_s is None else f"{max_first_good_s:g} s",
            not marks or (first_good is not None and (max_first_good_s is None or first_good <= max_first_good_s)),
        ),
    ]


def count_row(line: int, what: str, number: int, wanted: int) -> Row:
    """A count that must be exactly `wanted`."""
    return Row(line, what, str(number), str(wanted), number == wanted)


def chosen_row(line: int, chosen: Reference) -> Row:
    """How many requests the reference engine answers in one way only."""
    return Row(line, "requests with one answer on the reference", chosen.words(), "printed", bool(chosen.known))


def books_row(line: int, stack: Stack, timeout_s: float = 90.0) -> Row:
    """The ledger's books, once no hand-off is open."""
    totals = settled_books(stack, timeout_s)
    figure = ", ".join(f"{word} {number}" for word, number in totals.items() if number)
    return Row(line, "the books balance", figure, "produced = sum of ends", balanced(totals))
