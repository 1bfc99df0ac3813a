# SPDX-License-Identifier: Apache-2.0
"""The applications that the end-to-end tests share. There is room for one of them; the tests of one run together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pools.process.shared_files import SHARED_MEMORY
from tests.support.durable import DURABLE_FILES, durable_application
from tests.support.faults import change as sizes
from tests.support.slot import Slot
from tests.support.stack import ROOT, Stack, forked_engines, running
from tests.support.tiers import FLOAT32, fresh_dir, tiers

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
HAPROXY = ROOT / "configs" / "quickstart-haproxy.yaml"


@pytest.fixture(scope="session", autouse=True)
def _forked_engines() -> Iterator[None]:
    """The engines beside the applications, whose answers are the reference."""
    with forked_engines():
        yield


@pytest.fixture(scope="session")
def slot() -> Iterator[Slot]:
    """One application at a time, so that they do not fill the memory together."""
    room = Slot()
    try:
        yield room
    finally:
        room.empty()


@pytest.fixture
def real_stack(slot: Slot) -> Stack:
    """1P2D of real vLLM engines in float32 behind Serve's own proxy: `configs/quickstart.yaml`."""
    stack: Stack = slot.take("real", lambda: running(QUICKSTART, name="e2e-real", change=sizes(1, 2)))
    return stack


@pytest.fixture
def nixl_stack(slot: Slot) -> Stack:
    """Every tier over NIXL, sink `unused`."""
    change = tiers(transport="nixl", cpu_gib=0.25, sink="unused", l1_gib=0.25, blocks=200, engine_kwargs=FLOAT32)
    stack: Stack = slot.take("nixl", lambda: running(QUICKSTART, name="e2e-tiers-nixl", change=change))
    return stack


@pytest.fixture
def mooncake_stack(slot: Slot) -> Stack:
    """LMCache over Mooncake, sink `write_through`, with files behind the memory of its server; no host memory."""
    stack: Stack = slot.take("mooncake", lambda: durable_application(fresh_dir(DURABLE_FILES)))
    return stack


def use_fake_engines(config: dict[str, Any]) -> None:
    """Change a config to fake engines, which answer at once and need no memory."""
    args = config["applications"][0]["args"]
    args["engine"] = {"type": "fake", "itl_ms": 5}


@dataclass(frozen=True)
class FakeStack:
    """An application on fake engines, and what was in /dev/shm before it."""

    stack: Stack
    shared_before: frozenset[Path]


@contextlib.contextmanager
def _behind_haproxy() -> Iterator[FakeStack]:
    shared = frozenset(SHARED_MEMORY.iterdir())
    with running(HAPROXY, name="e2e-fake-haproxy", change=use_fake_engines) as stack:
        yield FakeStack(stack, shared)


@pytest.fixture
def fake_stack(slot: Slot) -> FakeStack:
    """1P1D of fake engines behind HAProxy: `configs/quickstart-haproxy.yaml`."""
    started: FakeStack = slot.take("haproxy", _behind_haproxy)
    return started


@pytest.fixture
def fake_haproxy_stack(fake_stack: FakeStack) -> Stack:
    """The same without what was before it."""
    return fake_stack.stack


APPLICATIONS = ("real_stack", "nixl_stack", "mooncake_stack", "fake_stack")
"""Fixtures that start an application, in the order of their tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one application behind each other, in the order of their files; those without any first.

    Those that kill its replicas or scale it come late, and the one that ends it is the last.
    """
    late = ("test_faults.py", "test_examples.py", "test_ctrl_c.py")

    def place(item: pytest.Item) -> tuple[int, int]:
        used = [APPLICATIONS.index(name) + 1 for name in getattr(item, "fixturenames", ()) if name in APPLICATIONS]
        return max(used, default=0), late.index(item.path.name) + 1 if item.path.name in late else 0

    items.sort(key=place)
