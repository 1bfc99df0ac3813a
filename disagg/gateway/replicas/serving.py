# SPDX-License-Identifier: Apache-2.0
"""Who may serve: the states of replicas, pairs, pools and the application, from what is known of each replica. Pure.

These rules are nowhere else. Routing, `/health`, the gauges and the admin API ask this module. The SDK and
`disagg status` ask the admin API.

| state | new requests | why |
|---|---|---|
| `routable` | yes | |
| `slow` | where no other replica can be | its engine takes far longer than the best of the pool |
| `warming` | no hand-offs; a replica answers alone | it has moved no KV yet |
| `warming`, `crash_loop` | no; decode as a last resort | its pool loses one replica after the other: probation |
| `draining` | no; decode as a last resort | it says that it leaves |
| `unreachable` | no | it takes no connections |
| `quarantined` | no | the reason: its engine hangs, or it does not answer |
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

State = Literal["routable", "slow", "warming", "draining", "quarantined", "unreachable"]
"""States of a replica, the best first."""

SERVING: Collection[State] = ("routable", "slow")
"""States in which a replica counts as one of its pool."""

_ORDER: dict[str, int] = {state: rank for rank, state in enumerate(get_args(State))}

CRASH_LOOP = "crash_loop"


class Facts(Protocol):
    """What is known of one replica."""

    @property
    def reachable(self) -> bool: ...
    @property
    def quarantined(self) -> str | None: ...
    @property
    def draining(self) -> bool: ...
    @property
    def on_probation(self) -> bool: ...
    @property
    def slow(self) -> bool: ...


def may_serve(facts: Facts) -> bool:
    """Whether new requests may go to a replica: it may answer alone, and a warm pair may take hand-offs."""
    return is_well(facts) and not facts.on_probation


def is_well(facts: Facts) -> bool:
    """Whether nothing is wrong with the replica itself. A replica on probation may be well."""
    return facts.reachable and facts.quarantined is None and not facts.draining


def may_finish(facts: Facts) -> bool:
    """Whether a decode replica that leaves may take a request that no other replica can."""
    return facts.reachable and facts.quarantined is None


def may_be_warmed(prefill: Facts, decode: Facts) -> bool:
    """Whether the gateway may warm the pair of two replicas. A warm-up also shows whether they are reachable."""
    return not any(facts.quarantined is not None or facts.draining for facts in (prefill, decode))


@dataclass(frozen=True, slots=True)
class Standing:
    """The state of one replica or of one pool."""

    state: State | Literal["empty"]
    """A pool without replicas is `empty`, another one has the state of its best replica."""
    reason: str | None = None
    """One of a few fixed words, where the state alone does not say why."""

    def __str__(self) -> str:
        return self.state if self.reason is None else f"{self.state} ({self.reason})"


def replica_standing(facts: Facts, *, warm: bool) -> Standing:
    """The state of one replica.

    Args:
        warm: whether it has moved KV, or there is nobody that it could move KV with.
    """
    if facts.quarantined is not None:
        return Standing("quarantined", facts.quarantined)
    if not facts.reachable:
        return Standing("unreachable")
    if facts.draining:
        return Standing("draining")
    if facts.on_probation:
        return Standing("warming", CRASH_LOOP)
    if not warm:
        return Standing("warming")
    return Standing("slow" if facts.slow else "routable")


def pool_standing(replicas: Iterable[Standing]) -> Standing:
    """The state of a pool: that of its best replica, with the reason of the first that has one."""
    found = sorted(replicas, key=lambda standing: (_ORDER[standing.state], standing.reason is None))
    return found[0] if found else Standing("empty")


def num_serving(replicas: Iterable[Standing]) -> int:
    """How many replicas of a pool count as serving."""
    return sum(1 for standing in replicas if standing.state in SERVING)


@dataclass(frozen=True, slots=True)
class Application:
    """Whether requests are served, and by which pools."""

    status: Literal["ok", "degraded", "unavailable"]
    """`ok`: hand-offs. `degraded`: replicas of one pool answer alone. `unavailable`: nobody takes a new request."""
    reason: str | None = None
    """What keeps it from being `ok`, in words."""


def application(
    *, prefill: Standing, decode: Standing, any_pair: bool, any_decode: bool, any_prefill: bool
) -> Application:
    """The state of the application.

    Args:
        any_pair: whether some pair may take a hand-off.
        any_decode: whether some decode replica takes new requests, be it as a last resort.
        any_prefill: whether some prefill replica may answer alone.
    """
    if not any_decode:
        if any_prefill:
            return Application("degraded", f"the decode pool is {decode}; prefill replicas serve alone")
        return Application("unavailable", f"the decode pool is {decode}")
    if any_pair:
        return Application("ok")
    if prefill.state in SERVING:
        return Application("degraded", "no pair of replicas has moved KV yet; decode replicas serve alone")
    return Application("degraded", f"the prefill pool is {prefill}; decode replicas serve alone")
