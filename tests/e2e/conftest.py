# SPDX-License-Identifier: Apache-2.0
"""The applications that the end-to-end tests share. There is room for one of them; the tests of one run together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.faults import change as sizes
from tests.support.slot import Slot
from tests.support.stack import ROOT, Stack, forked_engines, running
from tests.support.tiers import FLOAT32, tiers

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
    """1P1D of real vLLM engines behind Serve's own proxy: `configs/quickstart.yaml`."""
    stack: Stack = slot.take("real", lambda: running(QUICKSTART, name="e2e-real"))
    return stack


@pytest.fixture
def faults_stack(slot: Slot) -> Stack:
    """1P2D of real engines in float32."""
    stack: Stack = slot.take("faults", lambda: running(QUICKSTART, name="e2e-faults", change=sizes(1, 2)))
    return stack


@pytest.fixture
def nixl_stack(slot: Slot) -> Stack:
    """Every tier over NIXL, sink `unused`."""
    change = tiers(transport="nixl", cpu_gib=0.25, sink="unused", l1_gib=0.25, blocks=200, engine_kwargs=FLOAT32)
    stack: Stack = slot.take("nixl", lambda: running(QUICKSTART, name="e2e-tiers-nixl", change=change))
    return stack


@pytest.fixture
def mooncake_stack(slot: Slot) -> Stack:
    """LMCache over Mooncake, sink `write_through`, no host memory."""
    change = tiers(transport="mooncake", sink="write_through", l1_gib=0.25, blocks=200, engine_kwargs=FLOAT32)
    stack: Stack = slot.take("mooncake", lambda: running(QUICKSTART, name="e2e-tiers-mooncake", change=change))
    return stack


def use_fake_engines(config: dict[str, Any]) -> None:
    """Change a config to fake engines, which answer at once and need no memory."""
    args = config["applications"][0]["args"]
    args["engine"] = {"type": "fake", "itl_ms": 5}


@pytest.fixture
def fake_haproxy_stack(slot: Slot) -> Stack:
    """1P1D of fake engines behind HAProxy: `configs/quickstart-haproxy.yaml`."""
    stack: Stack = slot.take("haproxy", lambda: running(HAPROXY, name="e2e-fake-haproxy", change=use_fake_engines))
    return stack


@dataclass(frozen=True)
class FakeStack:
    """An application on fake engines that may not be scaled, and what was in /dev/shm before it."""

    stack: Stack
    shared_before: frozenset[str]


@contextlib.contextmanager
def _unscaled() -> Iterator[FakeStack]:
    def change(config: dict[str, Any]) -> None:
        use_fake_engines(config)
        config["applications"][0]["external_scaler_enabled"] = False

    shared = frozenset(os.listdir("/dev/shm"))
    with running(QUICKSTART, name="e2e-fake", change=change) as stack:
        yield FakeStack(stack, shared)


@pytest.fixture
def fake_stack(slot: Slot) -> FakeStack:
    """1P1D of fake engines behind Serve's own proxy, without `external_scaler_enabled`."""
    started: FakeStack = slot.take("fake", _unscaled)
    return started


APPLICATIONS = ("real_stack", "faults_stack", "nixl_stack", "mooncake_stack", "fake_haproxy_stack", "fake_stack")
"""Fixtures that start an application, in the order of their tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one application behind each other, in the order of their files; those without any first.

    The examples are the last of theirs, because one of them scales it.
    """

    def place(item: pytest.Item) -> tuple[int, bool]:
        used = [APPLICATIONS.index(name) + 1 for name in getattr(item, "fixturenames", ()) if name in APPLICATIONS]
        return max(used, default=0), item.path.name == "test_examples.py"

    items.sort(key=place)
