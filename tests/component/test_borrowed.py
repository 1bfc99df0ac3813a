# SPDX-License-Identifier: Apache-2.0
"""The lists of borrowed names against what is installed: each holds, none is missing, and nothing else is replaced."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from pools import borrowed as of_pools
from tests.component.installed import OURS_OVER_THEIRS, sources
from transport.in_engine.patches import borrowed
from transport.upstream import loaded
from transport.upstream.compare import digest, problem
from transport.upstream.names import Borrowed, Platform

NAMES = (*borrowed.BORROWED, *of_pools.BORROWED)
COMPILED = {"torch:_foreach_copy_"}
COMMANDS = {"ray.serve.scripts:cli", "ray.serve.scripts:run"}
"""Functions in the source, commands once click has decorated them."""


def test_all_of_it_holds_and_both_readers_see_the_same() -> None:
    """What is expected of each name is there; the reader of sources, which never imports, finds what is loaded."""
    problems = {name.name: _difference(name) for name in NAMES}
    assert len(problems) > 300
    assert not {name: words for name, words in problems.items() if words is not None}


def _difference(name: Borrowed) -> str | None:
    is_class = name.name.rpartition(":")[2][:1].isupper() and "." not in name.name.rpartition(":")[2]
    found = loaded.find(name.name, with_source=not is_class or bool(name.holds))
    if (fault := problem(name, found)) is not None:
        return fault
    assert found is not None
    written = sources().find(name.name)
    if written is None or name.name in COMPILED:
        return None if written is None and name.name in COMPILED else "is not written where it is loaded from"
    if written.parameters != found.parameters and name.name not in COMMANDS:
        return f"is written with {written.parameters} and loaded with {found.parameters}"
    if written.source and found.source and digest(written.source) != digest(found.source):
        return "is written otherwise than it is loaded"
    return None


def test_overrides_are_listed() -> None:
    """Whatever a class of ours defines that a foreign base has too is an entry for its module."""
    missing = {module: _unlisted(module) for module in OURS_OVER_THEIRS}
    assert not {module: names for module, names in missing.items() if names}


def _unlisted(module: str) -> set[str]:
    listed = {one.name: one for one in NAMES if module in one.used_in}
    missing = set()
    for ours in vars(importlib.import_module(module)).values():
        if not inspect.isclass(ours) or ours.__module__ != module:
            continue
        theirs = [base for base in ours.__mro__ if base.__module__.partition(".")[0] in {one.package for one in NAMES}]
        for member, value in vars(ours).items():
            bases = [base for base in theirs if member in vars(base)]
            if not bases or not (isinstance(value, staticmethod | classmethod) or inspect.isfunction(value)):
                continue
            if getattr(ours, "__dataclass_fields__", None) and member.startswith("__"):
                continue
            names = [name for name in listed if name.endswith(f".{member}") and _is_of(name, theirs)]
            if not names:
                missing.add(f"{ours.__name__}.{member}")
    return missing


def _is_of(name: str, bases: list[type]) -> bool:
    """Whether the entry is of one of these classes, by whatever module it is imported from."""
    module, _, path = name.partition(":")
    owner = loaded.static(importlib.import_module(module), path.split(".")[0])
    return owner in bases


BEFORE_AND_AFTER = """
import sys, types
sys.path.insert(0, {root!r})
import vllm.v1.worker.gpu_model_runner, vllm.distributed.device_communicators.shm_broadcast, torch.accelerator
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.platforms.cpu import CpuPlatform
from transport.in_engine.patches.replaced import REPLACED
from transport.upstream.names import Process
from transport.upstream.replacing import apply, chosen, replaced
from typing import get_args

def attributes():
    found = {{}}
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and name.split(".")[0] in ("vllm", "torch", "nixl", "zmq"):
            for attribute, value in list(vars(module).items()):
                found[f"{{name}}:{{attribute}}"] = value
                if isinstance(value, type) and value.__module__ == name:
                    found |= {{f"{{name}}:{{value.__qualname__}}.{{a}}": v for a, v in list(vars(value).items())}}
    return found

apply((), "worker", {platform!r})
for one in REPLACED:
    __import__(one.by.partition(":")[0]) if one.of == "the process" else None
before = attributes()
for process in get_args(Process):
    apply(REPLACED, process, {platform!r})
after = attributes()
changed = {{name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}}
changed = {{name for name in changed if name.rpartition(".")[2] not in ("__annotations__", "__warningregistry__")}}
listed = {{one.name for one in REPLACED if {platform!r} in one.platforms and one.of == "the process"}}
assert changed == replaced() == listed, (changed, replaced(), listed)
print(len(before), len(changed))
"""


@pytest.mark.parametrize(("platform", "number"), [("cpu", 6), ("cuda", 0)])
def test_what_is_replaced_is_what_the_list_says(platform: Platform, number: int) -> None:
    """All attributes of vLLM's and torch's modules and classes before and after: those of the list differ, no other."""
    script = BEFORE_AND_AFTER.format(root=str(Path(__file__).resolve().parents[2]), platform=platform)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen, changed = (int(word) for word in done.stdout.split()[-2:])
    assert seen > 10_000
    assert changed == number
