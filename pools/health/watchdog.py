# SPDX-License-Identifier: Apache-2.0
"""Watches one engine from inside its replica: asks it for a token when it is idle, and its transport now and then.

`pools.health.health` decides; the watchdog keeps the time, asks, and reports. It reports an engine that has to be
replaced to `on_hang`, which ends the process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from pools.engine.base import Engine
from pools.errors import EngineDeadError
from pools.health.hang_limits import HangLimits
from pools.health.health import EngineHealth, HangRules, ListenerRules, Reason, progress
from pools.health.listener_probe import ListenerProbe

logger = logging.getLogger(__name__)

PROMPT = (1, 2, 3)
"""Short enough to cost one step, and never a full block, so that it leaves nothing in any cache."""
_LOOK_S = 0.25
_LISTENER_S = 5.0
_LISTENER_AGAIN_S = 1.0
"""Seconds until the listener is asked again after a miss."""
_LISTENER_ANSWER_S = 1.0
_LISTENER_LAST_ANSWER_S = 5.0
"""Time limit of the question that decides on a replacement: decode engines wait as long for a handshake."""
_SILENT_S = 1.0
"""When an engine has owed a token for this long, a miss of its listener is not counted. The listener lives in the
engine's process, so the owed token alone decides."""


class Watchdog:
    """The state of one engine. Used from the engine's event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        probe_interval_s: float,
        limits: HangLimits,
        on_hang: Callable[[str], None],
        carrying: Callable[[], bool],
        listener: ListenerProbe | None = None,
        cpu_s: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watches nothing yet.

        Args:
            on_hang: is told, once, why the engine has to be replaced.
            carrying: whether requests are under way at the replica. An engine that counts nothing meanwhile is asked
                for a token sooner.
            listener: asks the engine's transport; None where the transport has no listener.
            cpu_s: the CPU seconds of an engine that computes on CPUs; None for others.
        """
        self._engine = engine
        self._carrying = carrying
        self._on_hang = on_hang
        self._listener = listener
        self._cpu_s = cpu_s
        self._listener_failures: set[type[Exception]] = set()
        self._clock = clock
        self._rules = HangRules(
            probe_interval_s=probe_interval_s,
            hang_after_s=limits.suspect_s,
            replace_after_s=limits.replace_s,
            now=clock(),
        )
        self._listener_rules = ListenerRules()
        self._state: Reason | None = None
        self._since = clock()
        self._hung: str | None = None
        self._asking: asyncio.Task[None] | None = None
        self._loops: list[asyncio.Task[None]] = []

    async def first_answer(self) -> None:
        """Return when the engine has produced a token. No time limit: the first one may need code compiled, and the
        caller bounds the whole start."""
        began = self._clock()
        await self._engine.probe(PROMPT)
        self._rules.look(self._clock(), progress(self._engine.stats()))
        self._rules.answered(self._clock() - began)

    def start(self) -> None:
        """Begin to watch."""
        self._loops = [asyncio.create_task(self._watch())]
        if self._listener is not None:
            self._loops.append(asyncio.create_task(self._watch_listener(self._listener)))

    def stop(self) -> None:
        for task in [*self._loops, *([self._asking] if self._asking else [])]:
            task.cancel()

    def health(self) -> EngineHealth:
        """What the watchdog knows at the moment. Does not ask the engine."""
        return EngineHealth(
            state="suspect" if self._state else "ok",
            reason=self._state,
            since_s=round(self._clock() - self._since, 3),
            probe_s=None if self._rules.probe_s is None else round(self._rules.probe_s, 4),
            num_probes=self._rules.num_probes,
        )

    def check(self) -> None:
        """Raises EngineDeadError when the engine is dead or has to be replaced, or when nobody watches it."""
        if (reason := self._engine.dead) is not None:
            raise EngineDeadError(str(reason))
        if self._hung is not None:
            raise EngineDeadError(self._hung)
        for task in self._loops:
            if task.done() and not task.cancelled():
                raise EngineDeadError(f"the watchdog of the engine has ended: {task.exception()!r}")

    def look(self) -> None:
        """One look at the engine; asks it for a token when that is due."""
        self._rules.look(self._clock(), progress(self._engine.stats()), carrying=self._carrying())
        if self._cpu_s is not None and self._rules.wants_cpu:
            self._rules.used_cpu(self._cpu_s())
        self._take_state()
        if (why := self._rules.verdict or self._listener_rules.verdict) is not None:
            self._give_up(why)
        elif self._rules.is_due and self._engine.dead is None:
            self._rules.asked()
            self._asking = asyncio.create_task(self._ask())

    async def _watch(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(_LOOK_S)

    async def _ask(self) -> None:
        began = self._clock()
        try:
            await self._engine.probe(PROMPT)
        except EngineDeadError:
            # The engine's `dead` says so, too. The replica watches it and ends the process.
            self._rules.failed()
        except Exception:
            if not self._rules.was_refused:
                logger.exception("the engine refused to be probed; it is asked again")
            self._rules.failed()
        else:
            self._rules.answered(self._clock() - began)
            self._take_state()

    async def _watch_listener(self, listener: ListenerProbe) -> None:
        while True:
            missed = self._listener_rules.num_misses
            await asyncio.sleep(_LISTENER_AGAIN_S if missed else _LISTENER_S)
            timeout_s = _LISTENER_LAST_ANSWER_S if self._listener_rules.is_suspect else _LISTENER_ANSWER_S
            try:
                well = await listener(timeout_s)
            except Exception as exc:
                # The question failed on this side, which says nothing about the listener.
                if type(exc) not in self._listener_failures:
                    self._listener_failures.add(type(exc))
                    logger.exception("the transport's listener could not be asked; it is asked again")
                continue
            if well or self._rules.silent_s < _SILENT_S:
                self._listener_rules.answered(well)

    def _take_state(self) -> None:
        reason: Reason | None = self._rules.reason or ("listener" if self._listener_rules.is_suspect else None)
        if reason == self._state:
            return
        self._state, self._since = reason, self._clock()
        if reason is None:
            logger.warning("the engine works again")
        else:
            logger.warning("the engine is suspect (%s): %.1f s without a sign of it", reason, self._rules.silent_s)

    def _give_up(self, why: str) -> None:
        if self._hung is None:
            self._hung = why
            self._on_hang(why)
