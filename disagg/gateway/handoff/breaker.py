# SPDX-License-Identifier: Apache-2.0
"""One breaker for each pair of replicas. It opens when hand-offs between the two keep failing while both work. Pure.

A decode engine answers a hand-off before the gateway knows whether the engine has read the KV. A decode engine that
cannot read KV computes the prompt itself, and reports `unread` later. The breaker then takes back the success that it
had counted for the hand-off.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cachetools import FIFOCache

from disagg.gateway.replicas.membership import Pair

THRESHOLD = 3
"""Failures in a row that open a breaker."""
_FIRST_REST_S = 0.5
_MAX_REST_S = 30.0
_MAX_REMEMBERED = 16_384
"""How many hand-offs the breaker remembers, and how many successes it can take back. The last seconds are enough."""


@dataclass
class _State:
    num_failures: int = 0
    """In a row."""
    num_opened: int = 0
    """How often the breaker has opened since the pair's last success."""
    said: bool = False


@dataclass(frozen=True)
class Opened:
    """A breaker that has just opened."""

    pair: Pair
    rest_s: float
    """How long the pair rests before it is warmed again. Doubles with each opening until a hand-off succeeds."""
    first: bool
    """Whether this pair's breaker has never opened before."""


class PairBreaker:
    """What became of the newest hand-offs of each pair. Not thread-safe."""

    def __init__(self) -> None:
        self._pairs: FIFOCache[str, Pair] = FIFOCache(_MAX_REMEMBERED)
        # By incarnations: a pair's state ends when either of its replicas does.
        self._states: dict[tuple[str, str], _State] = {}
        # From a hand-off's id to the state of its pair that its success has reset.
        self._forgiven: FIFOCache[str, _State] = FIFOCache(_MAX_REMEMBERED)

    def begin(self, handoff_id: str, pair: Pair) -> None:
        """Remember the pair of a hand-off, so that its success or failure counts for that pair."""
        self._pairs[handoff_id] = pair

    def pair_of(self, handoff_id: str) -> Pair | None:
        """The pair of a hand-off; None before `begin` and after `over` or `failed`."""
        return self._pairs.get(handoff_id)

    def over(self, handoff_id: str) -> None:
        """Forget a hand-off: nothing that an engine reports of it later counts against its pair."""
        self._pairs.pop(handoff_id, None)
        self._forgiven.pop(handoff_id, None)

    def succeeded(self, handoff_id: str) -> None:
        """A hand-off was answered."""
        pair = self._pairs.get(handoff_id)
        state = None if pair is None else self._states.get(pair.key)
        if pair is None or state is None or not (state.num_failures or state.num_opened):
            return
        self._states[pair.key] = _State(said=state.said)
        self._forgiven[handoff_id] = state

    def failed(self, handoff_id: str) -> Opened | None:
        """Count a hand-off that failed by its pair's fault, and take its success back if it had one.

        Each hand-off fails once. Returns an `Opened` if this failure opens the breaker.
        """
        pair = self._pairs.pop(handoff_id, None)
        if pair is None:
            return None
        state = self._states.setdefault(pair.key, _State())
        forgiven = self._forgiven.pop(handoff_id, None)
        if forgiven is not None:
            state.num_failures = max(state.num_failures, forgiven.num_failures)
            state.num_opened = max(state.num_opened, forgiven.num_opened)
        state.num_failures += 1
        if state.num_failures < THRESHOLD:
            return None
        opened = Opened(pair, min(_FIRST_REST_S * 2**state.num_opened, _MAX_REST_S), first=not state.said)
        self._states[pair.key] = _State(num_opened=state.num_opened + 1, said=True)
        return opened

    def retain(self, pairs: Collection[tuple[str, str]]) -> None:
        """Forget the states of all pairs but these."""
        self._states = {pair: state for pair, state in self._states.items() if pair in pairs}
