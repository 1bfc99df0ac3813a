# SPDX-License-Identifier: Apache-2.0
"""What the proof of the tests' number and time makes of the files that it reads."""

from __future__ import annotations

from tests.prove.house_tests import counts, removed, slowest

PAGE = """# Removed

| test removed | why | where |
|---|---|---|
| `tests/unit/test_a.py::test_b` (207 cases, one a module) | a | `test_c` |
| `unit/test_a.py::test_d` | a | `tests/unit/test_a.py::test_e` |
| `tests/e2e/test_f.py::test_g` | a | b |
"""


def test_removed_tests_are_counted_by_tier() -> None:
    """A row counts once, or as often as it says; what stands in the other columns does not count."""
    assert removed(PAGE) == {"unit": 208, "e2e": 1}


def test_only_what_passed_counts() -> None:
    """Each former tier has to have what it had, less what is listed, and a tier that did not run has nothing."""
    found = {
        "unit": {"outcomes": {"passed": 2127, "skipped": 500}},
        "component": {"outcomes": {"passed": 197}},
        "engine": {"outcomes": {"passed": 98, "error": 1}},
    }
    rows = counts(found, removed(PAGE))
    assert [(row.figure, row.holds) for row in rows] == [("2127", True), ("295", False), ("0", False)]


def test_the_slowest_are_those_of_all_tiers() -> None:
    """Time in fixtures belongs to the test that waited for them."""
    found = {
        "unit": {"seconds": {"a": {"setup": 0.5, "call": 1.0}}},
        "e2e": {"seconds": {"b": {"setup": 40.0, "call": 1.0, "teardown": 1.0}}},
    }
    assert slowest(found) == [("b", 42.0), ("a", 1.5)]
