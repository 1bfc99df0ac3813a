# SPDX-License-Identifier: Apache-2.0
"""The applications that the end-to-end tests share. There is room for one of them; the tests of one run together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pools.process.shared_files import SHARED_MEMORY
from tests.support.answers import Answer, Case, cases
from tests.support.faults import Reference, reference
from tests.support.faults import change as sizes
from tests.support.slot import Slot
from tests.support.stack import BUILD, ROOT, Stack, aggregated_engine, forked_engines, running
from tests.support.tiers import FLOAT32, asked, case_of, fresh_dir, prompts, steady_at, tiers

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
HAPROXY = ROOT / "configs" / "quickstart-haproxy.yaml"
FILES = BUILD / "e2e-files"
"""Of the LMCache servers of both applications on real engines. Empty when a session begins."""
EVERY = 5
"""Every fifth case of the request set; that includes some of each kind."""


@pytest.fixture(scope="session", autouse=True)
def _forked_engines() -> Iterator[None]:
    """The engine beside the applications, whose answers are the reference."""
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


@pytest.fixture(scope="session")
def files() -> dict[str, str]:
    """`FILES` as a setting of LMCache's second level: what an application of this session wrote, and nothing older."""
    return {"type": "fs", "path": fresh_dir(FILES.name)}


@dataclass(frozen=True)
class Expected:
    """Requests, and the answers of one aggregated engine to them."""

    cases: list[Case]
    answers: list[list[Answer]]
    """To `cases`, alone and four at once."""
    tiers: tuple[list[Case], list[Answer]]
    """Prompts whose answer is the same computed, cached and beside others."""
    kept: tuple[list[Case], list[Answer]]
    """More of them, for the files that outlive an application."""
    faults: Reference
    """Streams whose answer is the same continued at any token."""


@pytest.fixture(scope="session", autouse=True)
def computing(request: pytest.FixtureRequest, _forked_engines: None) -> Iterator[Future[Expected] | None]:
    """The reference engine answers from the start, beside tests that keep the other core busy; None when none asks."""
    asked_for = any("expected" in getattr(item, "fixturenames", ()) for item in request.session.items)
    # The engine is closed before the thread is waited for: a session that ends early has a request under way there.
    with ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as engine:
        yield thread.submit(_computed, engine) if asked_for else None


@pytest.fixture
def expected(computing: Future[Expected] | None) -> Expected:
    """What the engines of the applications have to answer. Tests that name it after their application wait less."""
    assert computing is not None
    return computing.result()


def _computed(engine: contextlib.ExitStack) -> Expected:
    """The engine is closed as soon as it has answered, or sooner by whoever closes `engine`."""
    chosen = [case for i, case in enumerate(cases()) if i % EVERY == 0]
    candidates = [case_of(f"p{i}", prompt) for i, prompt in enumerate(prompts(18, seed=91))]
    with engine:
        url = engine.enter_context(aggregated_engine(name="e2e-reference", engine_kwargs=FLOAT32))
        answers = [asked(url, chosen, at_once) for at_once in (1, 4)]
        same, right = steady_at(url, candidates, 10)
        faults = reference(8, longest=600, tokens=(80, 160), url=url)
    assert len(same) == 10
    assert len(faults.known) >= 6, faults.words()
    return Expected(chosen, answers, (same[:6], right[:6]), (same[6:], right[6:]), faults)


@pytest.fixture
def real_stack(slot: Slot, files: dict[str, str]) -> Stack:
    """1P2D of real vLLM engines in float32 behind Serve's own proxy: `configs/quickstart.yaml` with tiers.

    NIXL, host memory, and LMCache with the sink `unused`, which writes files behind its memory.
    """

    def start() -> AbstractContextManager[Stack]:
        every = tiers(cpu_gib=0.25, sink="unused", l1_gib=0.25, l2=[files], blocks=200, whole_prompts=False)
        return running(QUICKSTART, name="e2e-real", change=sizes(1, 2, then=every))

    stack: Stack = slot.take("real", start)
    return stack


@pytest.fixture
def mooncake_stack(slot: Slot, files: dict[str, str]) -> Stack:
    """1P1D over Mooncake, and LMCache with the sink `write_through` over the files of `real_stack`; no host memory."""
    return take_mooncake(slot, files)


def take_mooncake(slot: Slot, files: dict[str, str]) -> Stack:
    """The application of `mooncake_stack`. It may not be scaled: `external_scaler_enabled` is off."""
    tier = tiers(
        transport="mooncake",
        sink="write_through",
        l1_gib=0.25,
        l2=[files],
        blocks=200,
        whole_prompts=False,
    )

    def unscaled(config: dict[str, Any]) -> None:
        tier(config)
        config["applications"][0]["external_scaler_enabled"] = False

    change = sizes(1, 1, then=unscaled)
    stack: Stack = slot.take("mooncake", lambda: running(QUICKSTART, name="e2e-mooncake", change=change))
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


APPLICATIONS = ("real_stack", "mooncake_stack", "fake_stack")
"""Fixtures that start an application, in the order of their tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one application behind each other, in the order of their files; those without any first.

    Those that kill its replicas or scale it come late, and the one that ends it is the last.
    """
    late = ("test_faults.py", "test_examples.py", "test_second_life.py", "test_ctrl_c.py")

    def place(item: pytest.Item) -> tuple[int, int]:
        used = [APPLICATIONS.index(name) + 1 for name in getattr(item, "fixturenames", ()) if name in APPLICATIONS]
        return max(used, default=0), late.index(item.path.name) + 1 if item.path.name in late else 0

    items.sort(key=place)
