# SPDX-License-Identifier: Apache-2.0
"""Whether an engine works, judged from what it has counted and how long it owes an answer. Pure: time is handed in.

An engine that counts something works. One that counts nothing is asked for one token of real work, and hangs when that
stays out while nothing is counted, for longer than the steps of its own requests have been seen to take.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pools.engine.base import EngineStats

State = Literal["ok", "suspect", "draining"]
Reason = Literal["hang", "probe_failed", "listener"]

_LONGEST_LOOK_S = 1.0
"""More time than this between two looks is this process's own: it was stopped, or its loop was."""
_CARRYING_S = 1.0
"""How soon an engine is asked that counts nothing although its replica carries requests."""
_STEPS_ALONE_S = 900.0
"""How long an engine may make steps that bring no token while it owes one: the prefill of a long prompt in chunks,
behind which the token waits, takes minutes on a slow machine, and each chunk is work that gets done."""
_SUSPECT_STEPS = 2
_REPLACE_STEPS = 4
"""How many times the longest step that was seen an engine with requests may take for the next one."""
_STEP_SEEN_S = 600.0
"""How long a step is remembered."""
_COMPUTES_S = 60.0
"""How long an engine may compute without a count; a deadlock that spins computes, too."""
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
    """How long the engine took for the last token that it was asked for without other work; None before the first."""
    num_probes: int = 0
    """How many of these it has answered."""

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
            probe_interval_s: idle time after which it is asked.
            hang_after_s: time without an answer or a count after which it is suspect, with requests at least.
            replace_after_s: the same, after which it has to be replaced.
        """
        self._interval_s = probe_interval_s
        self._hang_after_s = hang_after_s
        self._replace_after_s = replace_after_s
        self._looked_at = now
        # Seconds that this process was awake to see; the rest of the times are in these.
        self._awake = 0.0
        self._seen: tuple[int, int] | None = None
        self._done_at = 0.0
        self._moved_at = 0.0
        self._owed_since: float | None = None
        self._asked_at = 0.0
        self._outstanding = False
        self._carrying = False
        # Since when it has had requests without a count in between, and whether it has had any since the last count.
        self._carrying_since: float | None = None
        self._carried = False
        self._queued = False
        # (when it ended, how long it took) of long steps, each longer than those behind it.
        self._steps: deque[tuple[float, float]] = deque()
        # (when, CPU seconds) since the last count, and of this time how long it computed, and how long it did not.
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
        """Take over the CPU seconds of the engine's processes, read after `look` when it `wants_cpu`."""
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
        """Something was counted."""
        if self._carrying_since is not None:
            took_s = self._awake - max(self._moved_at, self._carrying_since) - self._stood_s
            # A process that mostly stood still was stopped, which is no step.
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
        """Of the steps with requests that ended of late; 0 when none was long, or when there are no requests."""
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
        """It came, `took_s` seconds after it was asked for."""
        self._outstanding = self.was_refused = False
        self._owed_since = None
        self._moved()
        self._done_at = self._awake
        if not self._queued:
            # Else it is the time of the requests before it, and says nothing about the engine.
            self.probe_s = took_s
            self.num_probes += 1

    def failed(self) -> None:
        """The engine refused to give one, though it is not dead. It goes on owing it."""
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
