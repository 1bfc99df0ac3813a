# SPDX-License-Identifier: Apache-2.0
"""The watchdog over a fake engine that can be made to hang while its HTTP server goes on."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve

from pools.config import CpuConfig, FakeEngineConfig, ModelConfig, PoolConfig
from pools.engine.fake.engine import FakeEngine
from pools.errors import EngineDeadError, EngineStartError
from pools.health import watchdog as watchdog_module
from pools.health.hang_limits import HangLimits
from pools.health.watchdog import Watchdog
from pools.replica import replica
from pools.replica.spec import ReplicaSpec
from transport.config import NixlConfig

LIMITS = HangLimits(suspect_s=5, replace_s=20)


class Hangs(FakeEngine):
    """Answers probes while `answers` is set."""

    def __init__(self) -> None:
        fast = {"itl_ms": 0, "prefill_ms_per_1k_tokens": 0}
        super().__init__("e", "decode", FakeEngineConfig(type="fake", **fast), model_id="tiny")
        self.answers = asyncio.Event()
        self.answers.set()
        self.num_asked = 0

    async def probe(self, *args: Any, **kwargs: Any) -> Any:
        self.num_asked += 1
        await self.answers.wait()
        return await super().probe(*args, **kwargs)


class Run:
    """A watchdog whose clock the test moves."""

    def __init__(self, **options: Any) -> None:
        self.engine = Hangs()
        self.now = 0.0
        self.hung: list[str] = []
        self.carries = False
        self.dog = Watchdog(
            self.engine,
            probe_interval_s=2,
            limits=LIMITS,
            on_hang=self.hung.append,
            carrying=lambda: self.carries,
            clock=lambda: self.now,
            **options,
        )

    async def wait(self, seconds: float) -> None:
        for _ in range(int(seconds * 4)):
            self.now += 0.25
            self.dog.look()
            for _ in range(5):
                await asyncio.sleep(0)


async def test_idle_engine_is_asked_every_interval() -> None:
    """About one token of work in two seconds, and the state stays ok."""
    run = Run()
    await run.dog.first_answer()
    await run.wait(20)
    assert 9 <= run.engine.num_asked <= 11
    health = run.dog.health()
    assert (health.state, health.reason, health.num_probes) == ("ok", None, run.engine.num_asked)
    assert health.probe_s == 0


async def test_hanging_engine_is_suspect_then_ends_the_process() -> None:
    """Suspect 5 s after the token that stays out, back to ok with it, replaced after 20 s; said once."""
    run = Run()
    await run.dog.first_answer()
    run.engine.answers.clear()
    await run.wait(6.75)
    assert run.dog.health().state == "ok"
    await run.wait(0.75)
    assert (run.dog.health().state, run.dog.health().reason) == ("suspect", "hang")
    await run.wait(3)
    assert run.dog.health().since_s == pytest.approx(3, abs=0.51)
    run.engine.answers.set()
    await run.wait(0.25)
    assert run.dog.health().state == "ok" and not run.hung
    run.dog.check()
    run.engine.answers.clear()
    await run.wait(40)
    assert len(run.hung) == 1 and "counted nothing" in run.hung[0]
    with pytest.raises(EngineDeadError, match="counted nothing"):
        run.dog.check()


async def test_engine_that_refuses_probes_is_suspect() -> None:
    """An exception of the engine is no answer; it is logged, and the engine is asked again."""
    run = Run()
    await run.dog.first_answer()

    async def refusing(*args: Any) -> Any:
        run.engine.num_asked += 1
        raise ValueError("not like this")

    run.engine.probe = refusing  # type: ignore[method-assign]
    await run.wait(8)
    assert (run.dog.health().reason, run.engine.num_asked) == ("probe_failed", 5)


async def test_the_first_answer_is_part_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take longer than an engine at work may owe a token, and no longer than the start as a whole."""
    quick = PoolConfig(hang_after_s=0.005, health_probe_timeout_s=0.01, startup_timeout_s=0.2)
    run = Run()
    run.engine.answers.clear()
    limits = HangLimits(suspect_s=0.005, replace_s=0.01)
    dog = Watchdog(run.engine, probe_interval_s=2, limits=limits, on_hang=run.hung.append, carrying=lambda: False)
    first = asyncio.create_task(dog.first_answer())
    await asyncio.sleep(0.05)
    run.engine.answers.set()
    await first

    run.engine.answers.clear()
    replica_id = SimpleNamespace(unique_id="d0")
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(replica_id=replica_id))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(replica.DecodePool, "_make_engine", lambda self: run.engine)
    spec = ReplicaSpec(
        model=ModelConfig(id="tiny", source="tiny"),
        platform="cpu",
        engine=FakeEngineConfig(type="fake"),
        cpu=CpuConfig(),
        transport=NixlConfig(),
        pool=quick,
    )
    num_asked = run.engine.num_asked
    with pytest.raises(EngineStartError, match=r"not ready after 0.2 s \(startup_timeout_s\)"):
        await replica.DecodePool.__init__(object.__new__(replica.DecodePool), spec.model_dump())
    assert run.engine.num_asked == num_asked + 1


async def test_cpu_time_is_read_only_of_a_suspicious_engine() -> None:
    """Not while it counts, nor without requests; then what it computes keeps it out of suspicion."""
    num_read = 0

    def cpu_s() -> float:
        nonlocal num_read
        num_read += 1
        return run.now

    run = Run(cpu_s=cpu_s)
    await run.dog.first_answer()
    run.engine.answers.clear()
    await run.wait(4)
    assert num_read == 0
    run.carries = True
    await run.wait(20)
    assert num_read > 10 and run.dog.health().state == "ok"


async def test_a_listener_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A question that fails on this side is logged once with its traceback, is no miss, and others follow."""
    monkeypatch.setattr(watchdog_module, "_LISTENER_S", 0.0)
    asked = asyncio.Event()
    num_asked = 0

    async def listener(timeout_s: float) -> bool:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 4:
            asked.set()
            await asyncio.Event().wait()
        raise OSError("too many open files")

    run = Run(listener=listener)
    await run.dog.first_answer()
    run.dog.start()
    try:
        await asyncio.wait_for(asked.wait(), 5)
        run.dog.check()
        assert run.dog._listener_rules.num_misses == 0
        assert caplog.text.count("could not be asked") == caplog.text.count("Traceback") == 1
    finally:
        run.dog.stop()


async def test_dead_engine_fails_the_check_at_once() -> None:
    """Serve hears of it without a probe."""
    run = Run()
    run.engine.fail(EngineDeadError("core is gone"))
    with pytest.raises(EngineDeadError, match="core is gone"):
        run.dog.check()
    await run.wait(4)
    assert run.engine.num_asked == 0


async def test_silent_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two misses make the replica suspect, the third ends it; the deciding question waits longer."""
    monkeypatch.setattr(watchdog_module, "_LISTENER_S", 0.001)
    monkeypatch.setattr(watchdog_module, "_LISTENER_AGAIN_S", 0.001)
    questions: asyncio.Queue[tuple[float, asyncio.Future[bool]]] = asyncio.Queue()

    async def listener(timeout_s: float) -> bool:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await questions.put((timeout_s, answer))
        return await answer

    async def answer(well: bool) -> float:
        timeout_s, waiting = await questions.get()
        waiting.set_result(well)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return timeout_s

    run = Run(listener=listener)
    await run.dog.first_answer()
    run.dog.start()
    try:
        assert await answer(True) == await answer(False) == 1.0
        await run.wait(0.25)
        assert run.dog.health().state == "ok"
        await answer(False)
        await run.wait(0.25)
        assert (run.dog.health().state, run.dog.health().reason) == ("suspect", "listener")
        assert await answer(False) == 5.0
        await run.wait(0.25)
        assert len(run.hung) == 1 and "listener" in run.hung[0]
    finally:
        run.dog.stop()


async def test_listener_of_a_silent_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is silent with its engine; the limit for engines decides, not the shorter one for listeners."""
    monkeypatch.setattr(watchdog_module, "_LISTENER_S", 0.0)
    monkeypatch.setattr(watchdog_module, "_LISTENER_AGAIN_S", 0.0)
    num_asked = 0

    async def listener(timeout_s: float) -> bool:
        nonlocal num_asked
        num_asked += 1
        await asyncio.sleep(0)
        return False

    run = Run(listener=listener)
    await run.dog.first_answer()
    run.engine.answers.clear()
    await run.wait(4)
    assert run.dog.health().state == "ok"
    run.dog.start()
    try:
        await run.wait(15)
        assert num_asked > 5 and not run.hung
        assert run.dog.health().reason == "hang"
    finally:
        run.dog.stop()


async def test_a_watchdog_that_ended_is_not_trusted() -> None:
    """Nobody watches any more, so Serve's check fails."""
    run = Run()
    run.dog.start()
    run.dog.check()
    run.engine.stats = lambda: None  # type: ignore[method-assign,assignment,return-value]
    await asyncio.wait(run.dog._loops)
    with pytest.raises(EngineDeadError, match="watchdog"):
        run.dog.check()
