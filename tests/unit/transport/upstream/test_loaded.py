# SPDX-License-Identifier: Apache-2.0
"""Whose an object is."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import FunctionType

import pytest

from transport.upstream.loaded import is_ours


@pytest.mark.parametrize(
    ("name", "spec", "ours"),
    [
        ("disagg.cli.serve_child", None, True),
        ("ray.serve", None, False),
        ("__main__", ModuleSpec("disagg.cli.serve_child", None), True),
        ("__main__", ModuleSpec("ray.serve.scripts", None), False),
        ("__main__", None, False),
    ],
)
def test_a_function_is_of_the_module_that_runs(name: str, spec: ModuleSpec | None, ours: bool) -> None:
    """A program started by `python -m` is called `__main__`; its spec says which module that is."""
    code = is_ours.__code__
    assert is_ours(FunctionType(code, {"__name__": name, "__spec__": spec})) is ours
