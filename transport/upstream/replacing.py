# SPDX-License-Identifier: Apache-2.0
"""Sets a foreign attribute to an object of ours, once, and finds all such attributes of a process."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from transport.upstream.loaded import OURS, is_ours, static
from transport.upstream.names import Platform, Process, Replacement


def chosen(replacements: Iterable[Replacement], process: Process, platform: Platform) -> list[Replacement]:
    """The replacements that belong into this process on this platform. Pure."""
    return [one for one in replacements if process in one.processes and platform in one.platforms]


def apply(replacements: Iterable[Replacement], process: Process, platform: Platform) -> list[str]:
    """Replace for good what the list says of this process and platform; returns the names. Idempotent.

    Replacements of one instance or one call are not applied here, but in the code that makes the instance or call.
    """
    applied = []
    for one in chosen(replacements, process, platform):
        if one.of == "the process":
            module, _, function = one.by.partition(":")
            replace(one, getattr(importlib.import_module(module), function))
            applied.append(one.name)
    return applied


def replace(replacement: Replacement, make: Callable[[Any], Any]) -> None:
    """Set the attribute to `make(original)`, unless what stands there is ours already."""
    holder, attribute = _holder(replacement)
    original = static(holder, attribute)
    if not is_ours(original):
        setattr(holder, attribute, make(original))


@contextlib.contextmanager
def during(replacement: Replacement, make: Callable[[Any], Any]) -> Iterator[None]:
    """Set the attribute to `make(original)` for the time of a `with`."""
    holder, attribute = _holder(replacement)
    original = static(holder, attribute)
    setattr(holder, attribute, make(original))
    try:
        yield
    finally:
        setattr(holder, attribute, original)


def _holder(replacement: Replacement) -> tuple[Any, str]:
    module_name, _, path = replacement.name.partition(":")
    holder: Any = importlib.import_module(module_name)
    *owners, attribute = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    return holder, attribute


def replaced(modules: Mapping[str, ModuleType | None] = sys.modules) -> set[str]:
    """`module:Class.attribute` of every foreign module and class that holds an object of ours, as the process is now.

    A module is foreign when it is not ours, not of the tests and not the program itself. A class counts where it is
    defined.
    """
    found = set()
    for name, module in list(modules.items()):
        if not isinstance(module, ModuleType) or name.partition(".")[0] in (*OURS, "tests", "__main__", "__mp_main__"):
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, ModuleType):
                continue
            if is_ours(value):
                found.add(f"{name}:{attribute}")
            elif inspect.isclass(value) and getattr(value, "__module__", None) == name:
                found |= {f"{name}:{value.__qualname__}.{a}" for a, held in list(vars(value).items()) if is_ours(held)}
    return found
