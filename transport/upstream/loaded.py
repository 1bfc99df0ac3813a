# SPDX-License-Identifier: Apache-2.0
"""Reads borrowed names from the packages of this process. It imports a package that is not imported yet.

It is cheap: it looks up only the names asked for, and reads source only for an entry that expects something of it.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from functools import partial
from types import FunctionType
from typing import Any

from transport.upstream.compare import Found

_NOTHING = object()
OURS = ("transport", "pools", "disagg")


def find(name: str, *, with_source: bool = True) -> Found | None:
    """What is loaded under `module:Class.attribute`; None where there is none."""
    module_name, _, path = name.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
    except ImportError:
        return None
    *owners, last = path.split(".") if path else [""]
    for owner in owners:
        value = getattr(value, owner, _NOTHING)
        if value is _NOTHING:
            return None
    if last:
        holder, value = value, static(value, last)
        if value is _NOTHING:
            is_class = inspect.isclass(holder)
            return Found() if (is_class and _is_set_on_instances(holder, last)) or hasattr(holder, last) else None
    return _described(value, with_source)


def static(holder: Any, name: str) -> Any:
    """The attribute as it is stored: a `classmethod` and not what it binds to. A module may make one on demand."""
    if not inspect.isclass(holder):
        return getattr(holder, name, _NOTHING)
    return inspect.getattr_static(holder, name, _NOTHING)


def _described(value: Any, with_source: bool) -> Found:
    function = inspect.unwrap(_function(value))
    source = ""
    if with_source and (inspect.isfunction(function) or inspect.isclass(function)):
        source = textwrap.dedent(inspect.getsource(function))
    return Found(_parameters(function) if inspect.isfunction(function) else None, source)


def _function(value: Any) -> Any:
    """What is behind a method's, a property's or a partial's wrapper."""
    if isinstance(value, classmethod | staticmethod):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    return value.func if isinstance(value, partial) else value


def _parameters(function: FunctionType) -> tuple[str, ...]:
    code = function.__code__
    names = list(code.co_varnames)
    plain = names[: code.co_argcount]
    only_by_name = names[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    rest = names[code.co_argcount + code.co_kwonlyargcount :]
    if code.co_flags & inspect.CO_VARARGS:
        plain.append(f"*{rest.pop(0)}")
    elif only_by_name:
        plain.append("*")
    plain += only_by_name
    if code.co_flags & inspect.CO_VARKEYWORDS:
        plain.append(f"**{rest.pop(0)}")
    return tuple(plain)


def _is_set_on_instances(cls: type, name: str) -> bool:
    """Whether the class declares the attribute, or one of its methods names it."""
    for base in cls.__mro__:
        if name in vars(base).get("__annotations__", ()) or name in vars(base).get("__struct_fields__", ()):
            return True
        functions = (inspect.unwrap(_function(value)) for value in vars(base).values() if _is_function(value))
        if any(inspect.isfunction(function) and name in function.__code__.co_names for function in functions):
            return True
    return False


def _is_function(value: Any) -> bool:
    return isinstance(value, FunctionType | classmethod | staticmethod | property)


def is_ours(value: Any) -> bool:
    """Whether the object is a function, a class or a callable instance of a class that one of our packages made.

    `functools.wraps` copies a function's `__module__`, so the function's globals tell the module instead. In a program
    that `python -m` started, only the module's spec has its name. Instances that cannot be called do not count: vLLM
    keeps the connector that it was told to make in a variable of its own.
    """
    behind = _function(value)
    if isinstance(behind, FunctionType):
        module = behind.__globals__.get("__name__", "")
        if module == "__main__":
            module = getattr(behind.__globals__.get("__spec__"), "name", "")
    else:
        is_code = inspect.isclass(behind) or callable(behind)
        module = getattr(behind if inspect.isclass(behind) else type(behind), "__module__", "") if is_code else ""
    return isinstance(module, str) and module.partition(".")[0] in OURS
