# SPDX-License-Identifier: Apache-2.0
"""The drawn error tree, the classes, and their way through pickle."""

from __future__ import annotations

import pickle
import re

import pytest

import disagg.errors
import pools.errors
import transport.errors


def _drawn() -> dict[str, str | None]:
    """Parent of each class in the drawing."""
    parents: dict[str, str | None] = {}
    stack: list[tuple[int, str]] = []
    for line in (disagg.errors.__doc__ or "").splitlines():
        if match := re.match(r"^    ([ │├└─]*)([A-Za-z]+Error)\b", line):
            depth = len(match[1])
            while stack and stack[-1][0] >= depth:
                stack.pop()
            parents[match[2]] = stack[-1][1] if stack else None
            stack.append((depth, match[2]))
    return parents


def _classes() -> dict[str, type[transport.errors.DisaggError]]:
    found = {}
    for module in (transport.errors, pools.errors, disagg.errors):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, transport.errors.DisaggError):
                found[value.__name__] = value
    return found


def test_drawing_matches_classes() -> None:
    """The docstring draws every class under its base, and no other."""
    actual = {
        name: None if cls is transport.errors.DisaggError else cls.__base__.__name__ for name, cls in _classes().items()
    }
    assert _drawn() == actual


def test_all_names_every_class() -> None:
    """`disagg.errors` re-exports the whole tree."""
    assert sorted(_classes()) == sorted(disagg.errors.__all__)


@pytest.mark.parametrize("cls", _classes().values(), ids=_classes().keys())
def test_survives_pickle(cls: type[transport.errors.DisaggError]) -> None:
    """Type, message and attributes cross a process boundary."""
    error = cls("what happened")
    for name in vars(error):
        setattr(error, name, "set")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == "what happened"
    assert vars(copy) == vars(error)


def test_request_error_codes() -> None:
    """A code given wins over the one of the class."""
    assert disagg.errors.ModelNotFoundError("x").code == "model_not_found"
    assert disagg.errors.ModelNotFoundError("x", code="y").code == "y"
    assert disagg.errors.InvalidRequestError("x", param="n").param == "n"
