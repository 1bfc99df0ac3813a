# SPDX-License-Identifier: Apache-2.0
"""Whether an engine works, judged from what it has counted and how long it owes an answer. Pure: time is handed in.

An engine whose counters rise works. The watchdog asks an engine whose counters stand still for one token of real work.
The engine hangs when the token does not come and no counter rises, for longer than the limits allow. The limits grow
with the longest step that the engine's own requests were seen to take.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pools.engine.base import EngineStats

State = Literal["ok", "suspect", "draining"]
Reason = Literal["hang", "probe_failed", "listener"]

_LONGEST_LOOK_S = 1.0
"""More time than this between two looks is not held against the engine: this process or its event loop stood still."""
_CARRYING_S = 1.0
"""Seconds after which an engine is asked for a token if it counts nothing although its replica carries requests."""
_STEPS_ALONE_S = 900.0
"""How long an engine may make steps that bring no token while it owes one. On a slow machine the prefill of a long
prompt in chunks takes minutes, and the owed token waits behind it; each chunk is work that gets done."""
_SUSPECT_STEPS = 2
_REPLACE_STEPS = 4
"""An engine with requests becomes suspect, or is replaced, at the earliest after this many times the longest step that
it was seen to take."""
_STEP_SEEN_S = 600.0
"""How long a step is remembered."""
_COMPUTES_S = 60.0
"""How long an engine may compute without a count before that time is held against it. There is a limit, because a
deadlock that spins computes, too."""
_COMPUTING_CORES = 0.5
_CPU_WINDOW_S = 2.0
_CPU_WINDOW_MIN_S = 1.0
"""vLLM's processes spin on a queue for a second after each message, which must not look like work."""


@dataclass(frozen=True)
class EngineHealth:
    """What a replica says of itself, on `GET /disagg/v1/health`."""

    state: State = "ok"
    reason: Reason | None = None
    """Why it is suspect."""
    since_s: float = 0.0
    """How long it has been in that state, in seconds."""
    probe_s: float | None = None
    """Seconds that the engine took for the last probe token, without other work before it; None before the first."""
    num_probes: int = 0
    """How many such probes the engine has answered."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def progress(stats: EngineStats) -> tuple[int, int]:
    """(what an engine has got done, the steps it has made); neither ever falls."""
    done = (
        stats.generation_tokens_total
        + stats.prompt_tokens_total
        + stats.nixl_bytes_transferred_total
        + stats.mooncake_bytes_transferred_total
    )
    return done, stats.num_steps_total


class HangRules:
    """What to make of one engine's counters and of the token it was asked for. All times are seconds of one clock."""

    def __init__(self, *, probe_interval_s: float, hang_after_s: float, replace_after_s: float, now: float) -> None:
        """Start with an engine that works.

        Args:
            probe_interval_s: idle time after which the engine is asked for a token.
            hang_after_s: time without an answer and without a count after which the engine is suspect. Long steps of
                its requests raise this limit.
            replace_after_s: the same time after which the engine has to be replaced.
        """
        self._interval_s = probe_interval_s
        self._hang_after_s = hang_after_s
        self._replace_after_s = replace_after_s
        self._looked_at = now
        # Seconds for which this process was awake. All times below are on this clock.
        self._awake = 0.0
        self._seen: tuple[int, int] | None = None
        self._done_at = 0.0
        self._moved_at = 0.0
        self._owed_since: float | None = None
        self._asked_at = 0.0
        self._outstanding = False
        self._carrying = False
        # Since when the replica has carried requests without a count; and whether it has since the last count.
        self._carrying_since: float | None = None
        self._carried = False
        self._queued = False
        # For long steps: (when the step ended, how long it took). Each is longer than those after it in the queue.
        self._steps: deque[tuple[float, float]] = deque()
        # Since the last count: (when, CPU seconds), and how long the engine computed, and how long it stood still.
        self._cpu: deque[tuple[float, float]] = deque()
        self._computed_s = self._stood_s = 0.0
        self.was_refused = False
        self.probe_s: float | None = None
        self.num_probes = 0

    def look(self, now: float, seen: tuple[int, int], *, carrying: bool = False) -> None:
        """Take over the time, the engine's `progress`, and whether its replica carries requests."""
        self._carrying = carrying
        self._awake += min(now - self._looked_at, _LONGEST_LOOK_S)
        self._looked_at = now
        if self._seen is None or seen != self._seen:
            if self._seen is None or seen[0] != self._seen[0]:
                self._done_at = self._awake
            self._moved()
            self._seen = seen
        if not carrying:
            self._carrying_since = None
        elif self._carrying_since is None:
            self._carrying_since = self._awake
        self._carried = self._carried or carrying
        self._queued = self._queued or carrying

    def used_cpu(self, total_s: float) -> None:
        """Take over the CPU seconds of the engine's processes. Call it after `look`, if `wants_cpu`."""
        if not self._cpu:
            self._cpu.append((self._awake, total_s))
            return
        passed_s = self._awake - self._cpu[-1][0]
        while len(self._cpu) > 1 and self._awake - self._cpu[1][0] >= _CPU_WINDOW_S:
            self._cpu.popleft()
        self._cpu.append((self._awake, total_s))
        window_s = self._awake - self._cpu[0][0]
        if window_s < _CPU_WINDOW_MIN_S:
            return
        if total_s - self._cpu[0][1] <= _COMPUTING_CORES * window_s:
            self._stood_s += passed_s
        elif self._computed_s < _COMPUTES_S:
            self._computed_s += passed_s

    @property
    def wants_cpu(self) -> bool:
        """Whether the CPU time of the engine's processes matters: requests wait, and nothing has been counted for half
        of the time that makes it suspect."""
        return self._carried and self.silent_s >= self._suspect_s / 2

    def _moved(self) -> None:
        """Note that a counter rose, or that a token came."""
        if self._carrying_since is not None:
            took_s = self._awake - max(self._moved_at, self._carrying_since) - self._stood_s
            # An engine that mostly stood still was stopped; that time was no step.
            if _SUSPECT_STEPS * took_s > self._hang_after_s and took_s >= self._stood_s:
                while self._steps and self._steps[-1][1] <= took_s:
                    self._steps.pop()
                self._steps.append((self._awake, took_s))
        self._moved_at = self._awake
        self._carrying_since = None
        self._carried = False
        self._cpu.clear()
        self._computed_s = self._stood_s = 0.0

    @property
    def _longest_step_s(self) -> float:
        """The longest recent step with requests; 0 when none was long, or without requests since the last count."""
        while self._steps and self._awake - self._steps[0][0] > _STEP_SEEN_S:
            self._steps.popleft()
        return self._steps[0][1] if self._steps and self._carried else 0.0

    @property
    def _suspect_s(self) -> float:
        return max(self._hang_after_s, _SUSPECT_STEPS * self._longest_step_s)

    @property
    def _replace_s(self) -> float:
        return max(self._replace_after_s, _REPLACE_STEPS * self._longest_step_s)

    def asked(self) -> None:
        """A token was asked for."""
        self._outstanding = True
        self._queued = self._carrying
        self._asked_at = self._awake
        if self._owed_since is None:
            self._owed_since = self._awake

    def answered(self, took_s: float) -> None:
        """The token came, `took_s` seconds after it was asked for."""
        self._outstanding = self.was_refused = False
        self._owed_since = None
        self._moved()
        self._done_at = self._awake
        if not self._queued:
            # Otherwise the token waited for the requests before it, and its time says nothing about the engine.
            self.probe_s = took_s
            self.num_probes += 1

    def failed(self) -> None:
        """The probe ended with an error instead of the token. The engine goes on owing the token."""
        self._outstanding = False
        self.was_refused = True

    @property
    def is_due(self) -> bool:
        """Whether it is time to ask: nothing is counted, and nothing is asked for already."""
        interval_s = min(self._interval_s, _CARRYING_S) if self._carrying else self._interval_s
        return not self._outstanding and self._awake - max(self._moved_at, self._asked_at) >= interval_s

    @property
    def silent_s(self) -> float:
        """How long the engine has owed a token and counted nothing; 0 when it owes none."""
        if self._owed_since is None:
            return 0.0
        return self._awake - max(self._owed_since, self._moved_at)

    @property
    def reason(self) -> Reason | None:
        """Why the engine is suspect, or None."""
        if self.silent_s - self._computed_s < self._suspect_s:
            return None
        return "probe_failed" if self.was_refused and not self._outstanding else "hang"

    @property
    def verdict(self) -> str | None:
        """Why the engine has to be replaced, in words, or None."""
        if self._owed_since is None:
            return None
        if self.silent_s - self._computed_s >= self._replace_s:
            return f"its engine counted nothing for {self.silent_s:.1f} s while it was asked for one token"
        fruitless_s = self._awake - max(self._owed_since, self._done_at)
        if fruitless_s >= max(_STEPS_ALONE_S, self._replace_s):
            return f"its engine made steps for {fruitless_s:.1f} s that brought no token, though it was asked for one"
        return None


class ListenerRules:
    """What to make of a transport's listener that is asked every few seconds."""

    _SUSPECT_AFTER = 2
    _REPLACE_AFTER = 3

    def __init__(self) -> None:
        self.num_misses = 0

    def answered(self, well: bool) -> None:
        self.num_misses = 0 if well else self.num_misses + 1

    @property
    def is_suspect(self) -> bool:
        return self.num_misses >= self._SUSPECT_AFTER

    @property
    def verdict(self) -> str | None:
        """Why the engine has to be replaced, in words, or None."""
        if self.num_misses < self._REPLACE_AFTER:
            return None
        return f"its transport's listener did not answer {self.num_misses} times in a row"
