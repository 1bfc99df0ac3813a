# SPDX-License-Identifier: Apache-2.0
"""Compares what was found of a borrowed name with what is expected of it. Pure."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from dataclasses import dataclass

from transport.upstream.names import Borrowed


@dataclass(frozen=True)
class Found:
    """What one version of a package has under a name."""

    parameters: tuple[str, ...] | None = None
    """The parameters of a function, with the stars of `*args`, `**kwargs` and a bare `*`; None for anything else."""
    source: str = ""
    """Its text, empty for a name that is merely bound."""


def problem(expected: Borrowed, found: Found | None) -> str | None:
    """What does not hold, in words that follow the name; None when all of it does."""
    if found is None:
        return "is gone"
    takes = found.parameters or ()
    if expected.parameters is not None and ", ".join(takes) != expected.parameters:
        return f"takes ({', '.join(takes)}) and not ({expected.parameters})"
    bare = {name.lstrip("*") for name in takes}
    missing = [name for name in expected.takes.split(", ") if name and name not in bare]
    if missing and not any(name.startswith("**") for name in takes):
        return f"does not take {', '.join(missing)}"
    lost = [fragment for fragment in expected.holds if fragment not in found.source]
    if lost:
        return f"no longer holds {lost[0]!r}"
    if expected.body and digest(found.source) != expected.body:
        return f"has another body: its digest is {digest(found.source)} and not {expected.body}"
    return None


def digest(source: str) -> str:
    """Twelve hex digits that are equal for equal code, whatever its comments, docstrings and layout. Any Python."""
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:
        return hashlib.blake2b(source.encode(), digest_size=6).hexdigest()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    # Python 3.12 adds a field to functions and classes, empty for all code that 3.11 can read.
    text = ast.dump(tree).replace(", type_params=[]", "")
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
