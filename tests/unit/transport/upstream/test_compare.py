# SPDX-License-Identifier: Apache-2.0
"""What is found of a name against what is expected of it."""

from __future__ import annotations

import pytest

from transport.upstream.compare import Found, digest, problem
from transport.upstream.names import Borrowed

SOURCE = "def load(self, blocks, *, wait):\n    self.loads.append(blocks)\n"
FOUND = Found(("self", "blocks", "*", "wait"), SOURCE)


def expected(**more: object) -> Borrowed:
    return Borrowed("upstream.kv:Connector.load", ("transport.ours",), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        expected(),
        expected(parameters="self, blocks, *, wait"),
        expected(takes="wait, blocks"),
        expected(holds=("self.loads.append(blocks)",)),
        expected(body=digest(SOURCE)),
    ],
)
def test_what_is_as_expected_has_no_problem(name: Borrowed) -> None:
    """Existence, parameters, parts and the digest of the source, each alone."""
    assert problem(name, FOUND) is None


@pytest.mark.parametrize(
    ("name", "found", "words"),
    [
        (expected(), None, "is gone"),
        (expected(parameters="self, blocks"), FOUND, r"takes \(self, blocks, \*, wait\) and not \(self, blocks\)"),
        (expected(parameters="self"), Found(), r"takes \(\) and not \(self\)"),
        (expected(takes="blocks, timeout_s, device"), FOUND, "does not take timeout_s, device"),
        (expected(holds=("self.loads", "self.saves")), FOUND, "no longer holds 'self.saves'"),
        (expected(body="000000000000"), FOUND, f"its digest is {digest(SOURCE)} and not 000000000000"),
    ],
)
def test_what_does_not_hold_is_said(name: Borrowed, found: Found | None, words: str) -> None:
    """Each expectation that fails names what is there instead."""
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problem(name, found))


def test_a_function_that_takes_any_name_takes_ours() -> None:
    """`**kwargs` accepts every parameter that is passed by name."""
    assert problem(expected(takes="timeout_s"), Found(("self", "**kwargs"))) is None


def test_digests_are_of_code_alone() -> None:
    """Comments, docstrings, blank lines and indentation make no difference; a changed constant does."""
    same = '    def load(self, blocks, *, wait):\n        """Loads."""\n\n        self.loads.append( blocks )  # now\n'
    assert digest(same) == digest(SOURCE)
    assert digest(SOURCE.replace("append", "insert")) != digest(SOURCE)
