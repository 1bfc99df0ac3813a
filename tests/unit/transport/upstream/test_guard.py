# SPDX-License-Identifier: Apache-2.0
"""The check at start, over modules that are made up here, and what stands in for attributes of them."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from transport.errors import DisaggError, UpstreamChangedError
from transport.in_engine.patches.host_platform import without_progress_thread
from transport.upstream import loaded
from transport.upstream.guard import of_user, require
from transport.upstream.names import Borrowed, Platform, Process, Replacement, has, of
from transport.upstream.replacing import apply, chosen, during, replace, replaced

CODE = """
class Queue:
    limit: int
    def __init__(self, size, /, *more, wait, **rest):
        self._waiting = size
    @classmethod
    def build(cls, size): return cls(size)
    @property
    def size(self): return self._waiting
def make(): return "theirs"
"""


@pytest.fixture
def upstream() -> Iterator[Any]:
    """A foreign module of the name of one that is listed, for the guard says which version is installed."""
    module = ModuleType("uvicorn.made_up")
    exec(CODE.replace("class Queue", f"__name__ = {module.__name__!r}\nclass Queue", 1), module.__dict__)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def entry(name: str, **more: Any) -> Replacement:
    fields: dict[str, Any] = {
        "by": "transport.in_engine.patches.host_platform:without_progress_thread",
        "processes": frozenset({"worker"}),
        "platforms": frozenset({"cpu"}),
        "why": "",
        "source": "",
        "way_out": "",
    }
    return Replacement(f"uvicorn.made_up:{name}", **{**fields, **more})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Queue", None),
        ("Queue.__init__", ("self", "size", "*more", "wait", "**rest")),
        ("Queue.build", ("cls", "size")),
        ("Queue.size", ("self",)),
        ("Queue._waiting", None),
        ("Queue.limit", None),
        ("make", ()),
    ],
)
def test_loaded_names_are_found(upstream: Any, name: str, parameters: tuple[str, ...] | None) -> None:
    """Methods with all their parameters, properties, and attributes that only instances have."""
    found = loaded.find(f"uvicorn.made_up:{name}", with_source=False)
    assert found is not None
    assert found.parameters == parameters


@pytest.mark.parametrize("name", ["uvicorn.gone", "uvicorn.made_up:Gone", "uvicorn.made_up:Queue.gone"])
def test_what_is_not_loaded_is_not_found(upstream: Any, name: str) -> None:
    """A module, a class and a member that are not there."""
    assert loaded.find(name) is None


def test_the_guard_names_all_that_does_not_hold(upstream: Any) -> None:
    """Which names, the installed and the tested version, what differs and what to do; other users' names are left."""
    names = (
        *of("uvicorn.made_up:Queue", ("transport.a.b",), has("build", "cls, size, depth"), has("gone"), has("size")),
        Borrowed("uvicorn.made_up:also_gone", ("transport.ab",)),
    )
    with pytest.raises(UpstreamChangedError) as raised:
        require(names, "transport.a")
    message = str(raised.value)
    assert isinstance(raised.value, DisaggError)
    assert "uvicorn.made_up:Queue.build of uvicorn 0." in message
    assert "(tested: 0." in message
    assert "takes (cls, size) and not (cls, size, depth); uvicorn.made_up:Queue.gone of" in message
    assert "also_gone" not in message
    assert "make check-upstream" in message
    assert of_user(names, "transport.ab") == [names[-1]]
    require(names, "transport.other")


def test_a_package_that_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are checked where it is installed, and where it is not nothing is asked of it."""
    names = (Borrowed("mistral_common.made_up:gone", ("transport.a",)),)
    for spec in (None, object()):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with contextlib.nullcontext() if spec is None else pytest.raises(UpstreamChangedError, match="made_up:gone"):
            require(names, "transport.a")


@pytest.mark.parametrize(
    ("process", "platform", "applied"),
    [("worker", "cpu", ["uvicorn.made_up:make"]), ("worker", "cuda", []), ("api", "cpu", [])],
)
def test_only_what_the_list_says_is_replaced(
    upstream: Any, process: Process, platform: Platform, applied: list[str]
) -> None:
    """Other processes and platforms, and what is for an instance or a moment, are left out; twice is as once."""
    entries = [entry("make"), entry("Queue.build", of="one instance"), entry("Queue.size", of="a moment")]
    before = upstream.make
    for _ in range(2):
        assert apply(entries, process, platform) == applied
    assert (upstream.make is not before) == bool(applied)
    assert replaced({"uvicorn.made_up": upstream}) == set(applied)
    assert upstream.make.__wrapped__ is before if applied else upstream.make() == "theirs"
    assert len(chosen(entries, "worker", "cpu")) == 3


def test_everything_of_ours_in_foreign_modules_is_seen(upstream: Any) -> None:
    """Functions that wrap with the names of what they wrap, class methods and classes; no values, nothing of ours."""
    replace(entry("Queue.build"), lambda original: classmethod(without_progress_thread))
    upstream.Found = loaded.Found
    upstream.default = loaded.Found()
    upstream.make = without_progress_thread(upstream.make)
    assert upstream.make.__module__ == "uvicorn.made_up"
    names = {"Queue.build", "Found", "make"}
    assert replaced({"uvicorn.made_up": upstream, "transport.upstream.loaded": loaded}) == {
        f"uvicorn.made_up:{name}" for name in names
    }


def test_a_replacement_for_a_moment_is_undone(upstream: Any) -> None:
    """After the call, and after one that raises, the original stands there again."""
    before = upstream.make
    seen = []
    with contextlib.suppress(KeyError), during(entry("make"), without_progress_thread):
        seen.append(upstream.make)
        raise KeyError
    assert seen != [before]
    assert upstream.make is before
