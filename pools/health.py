# SPDX-License-Identifier: Apache-2.0
"""Asks an engine for real work: one token, unless it has produced some since the last question."""

from __future__ import annotations

import asyncio

from pools.engine.base import Engine
from pools.errors import EngineDeadError

_PROMPT = (1, 2, 3)
"""Short enough to cost one step, and never a full block, so that it leaves nothing in any cache."""


class HealthProbe:
    """Remembers how much an engine had done, so that a busy engine is not asked and an idle one is."""

    def __init__(self, engine: Engine, *, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._seen = -1

    async def check(self) -> None:
        """Return when the engine works. Raises EngineDeadError when it is dead or silent for `timeout_s`."""
        if (reason := self._engine.dead) is not None:
            raise EngineDeadError(str(reason))
        stats = self._engine.stats()
        done = stats.generation_tokens_total + stats.prompt_tokens_total
        if done > self._seen >= 0:
            self._seen = done
            return
        try:
            await asyncio.wait_for(self._engine.probe(_PROMPT), self._timeout_s)
        except TimeoutError as exc:
            raise EngineDeadError(f"no token within {self._timeout_s:g} s of asking for one") from exc
        stats = self._engine.stats()
        self._seen = stats.generation_tokens_total + stats.prompt_tokens_total
