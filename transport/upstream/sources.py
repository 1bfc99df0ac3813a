# SPDX-License-Identifier: Apache-2.0
"""Reads borrowed names from the source text of packages that need not be installed. Pure, but for its reader.

It follows imports and base classes within the same packages, as far as the text shows them. It does not find names that
a module makes at run time, nor names of compiled modules.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from transport.upstream.compare import Found

ReadModule: TypeAlias = Callable[[str], str | None]
"""Takes `package.module` and returns its text, or None. The text of a package is that of its `__init__.py`."""

_Node: TypeAlias = ast.stmt | ast.alias
_DEPTH = 16


@dataclass(frozen=True)
class _Place:
    """Where a name is bound. `node` is None for a module itself."""

    module: str
    node: _Node | None


class Sources:
    """One version of some packages."""

    def __init__(self, read: ReadModule) -> None:
        self._read = read
        self._parsed: dict[str, tuple[str, ast.Module] | None] = {}

    def find(self, name: str) -> Found | None:
        """What is written under `module:Class.attribute`; None where there is nothing."""
        module, _, path = name.partition(":")
        place: _Place | None = _Place(module, None)
        for part in path.split(".") if path else ():
            place = None if place is None else self._within(place, part)
        if place is None or self._module(place.module) is None:
            return None
        return self._described(place)

    def _module(self, name: str) -> tuple[str, ast.Module] | None:
        if name not in self._parsed:
            text = self._read(name)
            self._parsed[name] = None if text is None else (text, ast.parse(text))
        return self._parsed[name]

    def _described(self, place: _Place) -> Found:
        node, module = place.node, self._module(place.module)
        assert module is not None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return Found(_parameters(node.args), _text(module[0], node))
        if isinstance(node, ast.ClassDef):
            return Found(None, _text(module[0], node))
        return Found()

    def _within(self, place: _Place, name: str, depth: int = 0) -> _Place | None:
        if depth > _DEPTH:
            return None
        if isinstance(place.node, ast.ClassDef):
            return self._member(place, name, depth)
        if place.node is not None:
            # An instance or a value: the text does not show its attributes.
            return None
        module = self._module(place.module)
        found = None
        for node in _bindings(module[1].body if module else (), name):
            found = self._followed(place.module, node, name, depth)
            if found is not None and isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                break
        if found is None and self._module(f"{place.module}.{name}") is not None:
            return _Place(f"{place.module}.{name}", None)
        return found

    def _followed(self, module: str, node: _Node, name: str, depth: int) -> _Place | None:
        """The place where an imported name is defined; the import itself when that is in another package."""
        if isinstance(node, ast.Import):
            target = next(alias.name for alias in node.names if _bound_by(alias) == name)
            return _Place(target, None) if self._module(target) else _Place(module, node)
        if isinstance(node, ast.ImportFrom):
            source = _absolute(module, node, is_package=self._is_package(module))
            original = next(alias.name for alias in node.names if _bound_by(alias) == name)
            if self._module(source) is None:
                return _Place(module, node)
            return self._within(_Place(source, None), original, depth + 1)
        return _Place(module, node)

    def _is_package(self, module: str) -> bool:
        return self._read(f"{module}.__init__") is not None

    def _member(self, place: _Place, name: str, depth: int) -> _Place | None:
        node = place.node
        assert isinstance(node, ast.ClassDef)
        found = [_Place(place.module, member) for member in _bindings(node.body, name)]
        if found:
            # Of a property and its setter, or of overloads, the first has the type and the last the code.
            return found[-1] if not isinstance(found[-1].node, ast.AnnAssign) else found[0]
        for assigned in ast.walk(node):
            target = assigned.target if isinstance(assigned, ast.AnnAssign | ast.AugAssign) else None
            targets = assigned.targets if isinstance(assigned, ast.Assign) else [target] if target is not None else []
            if any(_is_of_self(one, name) for one in targets):
                return _Place(place.module, assigned)  # type: ignore[arg-type]
        for base in node.bases:
            inherited = self._base(place.module, base, depth)
            member = None if inherited is None else self._within(inherited, name, depth + 1)
            if member is not None:
                return member
        return None

    def _base(self, module: str, base: ast.expr, depth: int) -> _Place | None:
        base = base.value if isinstance(base, ast.Subscript) else base
        place: _Place | None = _Place(module, None)
        for part in ast.unparse(base).split("."):
            place = None if place is None else self._within(place, part, depth + 1)
        return place


def _bindings(body: Iterable[ast.stmt], name: str) -> Iterator[_Node]:
    """The statements that bind the name at this level, those under `if`, `try` and `with` among them."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name:
                yield node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if any(_bound_by(alias) == name for alias in node.names):
                yield node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for target in targets for t in ast.walk(target)):
                yield node
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from _bindings(getattr(node, field, ()), name)
            for handler in getattr(node, "handlers", ()):
                yield from _bindings(handler.body, name)


def _bound_by(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _absolute(module: str, node: ast.ImportFrom, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, node.module] if node.module else kept)


def _is_of_self(target: ast.expr, name: str) -> bool:
    return (
        isinstance(target, ast.Attribute)
        and target.attr == name
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    )


def _text(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg is not None:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    names += [one.arg for one in arguments.kwonlyargs]
    if arguments.kwarg is not None:
        names.append(f"**{arguments.kwarg.arg}")
    return tuple(names)
