# SPDX-License-Identifier: Apache-2.0
"""The two lists against our own sources: nothing is borrowed or replaced that they do not name."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pools import borrowed as of_pools
from pools.config import CpuConfig
from pools.plan.launch import engine_env
from transport.in_engine.patches import borrowed, replaced
from transport.in_engine.plugin import PLATFORM_VARIABLE
from transport.upstream.names import DISTRIBUTIONS, TESTED, Replacement

ROOT = Path(__file__).resolve().parents[4]
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): ast.parse(path.read_text(encoding="utf-8"))
    for package in ("disagg", "pools", "transport")
    for path in (ROOT / package).rglob("*.py")
}
NAMES = (*borrowed.BORROWED, *of_pools.BORROWED)
REPLACED = (*replaced.REPLACED, *of_pools.REPLACED)
PUBLIC = {
    *("prometheus_client", "prometheus_client.core", "prometheus_client.registry", "ray", "ray.exceptions"),
    *("ray.serve", "ray.serve.config", "ray.serve.handle", "ray.util.scheduling_strategies", "starlette.exceptions"),
    "starlette.middleware.cors",
    *("starlette.requests", "starlette.responses", "starlette.types", "torch", "uvicorn", "vllm", "zmq", "zmq.asyncio"),
}
"""Modules whose names their owners document and keep."""
FOREIGN = {*TESTED, "mooncake"}


def imports(tree: ast.Module) -> Iterator[str]:
    """`module:name` of what is imported at run time from the packages of the lists."""
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FOREIGN and not node.level:
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in FOREIGN)


def is_listed(imported: str, module: str) -> bool:
    """Whether an entry for this user of it, or of something in it, is there; as a module it may be spelled so too."""
    own, _, name = imported.partition(":")
    spelled = (imported, imported.replace(":", "."))
    mine = [one.name for one in NAMES if module in one.used_in]
    return any(f"{one}.".startswith((f"{way}.", f"{way}:")) for one in mine for way in spelled) or (
        own in PUBLIC and not name.startswith("_")
    )


def test_what_is_imported_is_listed() -> None:
    """Every import from a listed package is of a public module or an entry of the list, for that user."""
    found = {(module, name) for module, tree in MODULES.items() for name in imports(tree)}
    assert len(found) > 50
    assert not {(module, name) for module, name in found if not is_listed(name, module)}


def defined(tree: ast.Module) -> set[str]:
    """Names that a file defines, declares or sets itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


ARGPARSE = {"_SubParsersAction"}
OUR_NEIGHBOURS = set().union(*(defined(tree) for tree in MODULES.values()))
"""An underscore name of ours that another file of ours uses is no foreign one."""


def test_underscore_names_of_others_are_listed() -> None:
    """An attribute with a leading underscore that none of our files defines is an entry of the list for its user."""
    missing = set()
    for module, tree in MODULES.items():
        mine = {re.split("[.:]", one.name)[-1] for one in NAMES if module in one.used_in}
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        private = {name for name in used if name.startswith("_") and not name.startswith("__")}
        missing |= {(module, name) for name in private - mine - OUR_NEIGHBOURS - ARGPARSE}
    assert not missing


def foreign_names(tree: ast.Module) -> set[str]:
    """What a file calls the foreign modules, classes and functions that it imports."""
    return {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if ((node.module or "") if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0] in FOREIGN
    }


def test_attributes_of_others_are_set_in_one_place() -> None:
    """No file but `transport.upstream.replacing` assigns an attribute of an imported foreign module or class."""
    stored = {
        (module, ast.unparse(node))
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    foreign = {module: foreign_names(tree) for module, tree in MODULES.items()}
    assert not {(module, text) for module, text in stored if text.partition(".")[0] in foreign[module]}


def test_the_lists_hold_no_entry_twice_and_know_their_users() -> None:
    """A name is given once for one user, every user is a module of ours, and its package has a tested version."""
    twice = Counter((one.name, user) for one in NAMES for user in one.used_in if "." in one.name.partition(":")[2])
    assert not [entry for entry, number in twice.items() if number > 1]
    assert not {user for one in NAMES for user in one.used_in} - set(MODULES)
    assert {one.package for one in NAMES} <= set(TESTED)
    assert set(TESTED) == set(DISTRIBUTIONS)


@pytest.mark.parametrize("package", sorted(TESTED))
def test_the_tested_versions_are_those_of_the_lock(package: str) -> None:
    """What the guard and the list name is what `make setup` installs."""
    lines = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    versions = [pins[name].partition("+")[0] for name in DISTRIBUTIONS[package] if name in pins]
    assert versions == [TESTED[package]]


@pytest.mark.parametrize("one", REPLACED, ids=lambda one: one.name.rpartition(":")[2])
def test_replacements_are_told_in_full(one: Replacement) -> None:
    """Each is borrowed too, so that the guard looks at it, says why, its source and its way out, and has a maker."""
    assert one.name in {entry.name for entry in NAMES}
    assert one.why and one.source and one.way_out and one.processes and one.platforms
    module, _, path = one.by.partition(":")
    assert path.rpartition(".")[2] in defined(MODULES[module])


def test_on_cuda_nothing_is_replaced_in_an_engine() -> None:
    """No entry of the engines' list names that platform."""
    assert not [one.name for one in replaced.REPLACED if "cuda" in one.platforms]


@pytest.mark.parametrize("platform", [None, "cuda", "tpu"])
def test_the_plugin_leaves_other_engines_alone(platform: str | None) -> None:
    """Outside our engines, and on a platform without an entry, it loads no foreign package, not even vLLM."""
    script = (
        "import sys; from transport.in_engine.plugin import register; register()\n"
        f"assert not {FOREIGN!r} & sys.modules.keys(), sys.modules.keys()"
    )
    env = {key: value for key, value in os.environ.items() if key != PLATFORM_VARIABLE}
    env |= {PLATFORM_VARIABLE: platform} if platform else {}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_engines_are_told_what_the_plugin_asks_for() -> None:
    """The environment of our engines has the plugin's variable, which two packages spell."""
    assert engine_env("cpu", CpuConfig(), host="127.0.0.1")[PLATFORM_VARIABLE] == "cpu"
    assert engine_env("cuda", CpuConfig(), host="127.0.0.1")[PLATFORM_VARIABLE] == "cuda"
