# SPDX-License-Identifier: Apache-2.0
"""Which `engine_kwargs` the installed vLLM knows, without importing it (that takes seconds).

The names are read from vLLM's source, so they are those of the installed version and not of a copied list.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

_SOURCES = {
    "engine/arg_utils.py": {"EngineArgs", "AsyncEngineArgs"},
    "entrypoints/launchers/cli_args.py": {"BaseFrontendArgs", "FrontendArgs"},
}


def known_engine_kwargs() -> frozenset[str] | None:
    """Argument names of the installed vLLM, or None when it is not installed here. Reads two files.

    Source:
        vLLM 0.32 `AsyncEngineArgs` and `FrontendArgs`; a test compares the result with the classes.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    names: set[str] = set()
    for source, classes in _SOURCES.items():
        path = root / source
        if not path.is_file():
            return None
        names |= field_names(path.read_text(encoding="utf-8"), classes)
    return frozenset(names)


def field_names(source: str, classes: Iterable[str]) -> set[str]:
    """Public annotated fields of the named top-level classes in Python source."""
    wanted = set(classes)
    return {
        statement.target.id
        for node in _parsed(source).body
        if isinstance(node, ast.ClassDef) and node.name in wanted
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if not statement.target.id.startswith("_")
    }


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SystemError:
        # Python 3.11.7 and older: garbage that is collected meanwhile may parse, too (python/cpython#106905).
        return ast.parse(source)


def unknown_engine_kwargs(given: Iterable[str], known: Iterable[str]) -> str | None:
    """One line that names every key vLLM does not have, with the nearest known one; None if there is none."""
    known = sorted(known)
    unknown = [_with_guess(key, known) for key in given if key not in known]
    if not unknown:
        return None
    return f"vLLM has no argument {', '.join(unknown)}"


def _with_guess(key: str, known: list[str]) -> str:
    guess = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=1)
    return f"{key!r} (did you mean {guess[0]!r}?)" if guess else repr(key)
