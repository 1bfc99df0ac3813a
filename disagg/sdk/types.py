# SPDX-License-Identifier: Apache-2.0
"""What the admin API answers, typed. Values are snapshots; ask again for newer ones.

Fields that a newer server adds are kept aside and ignored, so an older client goes on working.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class Replica(_Answer):
    """One replica of a pool, as one gateway replica sees it."""

    replica_id: str
    """Name that Ray Serve gave it."""
    engine_id: str | None = None
    """Name by which KV transfers know the replica's engine."""
    incarnation: int | str | None = None
    """Changes when the engine behind the same name is a new one."""
    state: Literal["warming", "routable", "slow", "quarantined", "draining", "unreachable"] | str
    """`routable` replicas get requests, and `slow` ones where there is no other. `warming` ones have moved no KV
    yet and get no hand-offs. `quarantined` ones hang and are replaced, unless they work again before that."""
    reason: str | None = None
    """Why it is in that state, in a word: `hang`, `probe_failed`, `listener` or `unanswered` when quarantined,
    `crash_loop` when its pool lost several replicas and it has to stay well for a while first."""
    url: str | None = None
    """Address of its private HTTP server."""
    pid: int | None = None
    """Process id of the replica on its node."""
    num_requests_running: int | None = None
    """Requests in the engine's current batch."""
    num_requests_waiting: int | None = None
    """Requests queued in the engine."""
    num_requests_in_flight: int | None = None
    """HTTP requests that the replica carries."""
    kv_cache_usage: float | None = None
    """Part of the KV blocks in use, 0 to 1."""
    uptime_s: float | None = None
    """Seconds since the engine came up."""
    lmcache_http_url: str | None = None
    """Address of the LMCache server on its node: health, status and metrics. A managed server is on 127.0.0.1, so it is
    reached from the node itself only. None without a shared tier."""
    warm_peers: tuple[str, ...] = ()
    """Replicas of the other pool that it has exchanged KV with."""


class Pool(_Answer):
    """All replicas of one role."""

    name: str
    """`prefill` or `decode`."""
    target_num_replicas: int | None = None
    """The size it is meant to have; None when the gateway does not know it."""
    num_starting: int | None = None
    """Replicas that are not up yet; None when the gateway does not know it."""
    num_unplaced: int | None = None
    """Replicas for which no node has room."""
    num_stopping: int | None = None
    """Replicas that finish what they carry, or end."""
    pending_reason: str | None = None
    """Why replicas are not up, in words: what kept the last one from starting, or what no node has free."""
    num_routable: int
    """Replicas that get requests."""
    state: Literal["routable", "slow", "warming", "quarantined", "draining", "unreachable", "empty"] | str | None = None
    """State of the pool's best replica. Decode replicas serve alone unless prefill is `routable` or `slow`."""
    reason: str | None = None
    """Why it is in that state, in a word, as in `Replica`."""
    replicas: tuple[Replica, ...] = ()
    """Every replica that exists, ready or not."""

    def has_size(self, num_replicas: int) -> bool:
        """True when exactly `num_replicas` replicas exist, all of them get requests, and no other comes or goes."""
        return self.num_routable == num_replicas == len(self.replicas) and not self.num_changing

    @property
    def num_changing(self) -> int:
        """Replicas that are about to come or to go."""
        return sum(number or 0 for number in (self.num_starting, self.num_unplaced, self.num_stopping))


class Pools(_Answer):
    """All pools of an application."""

    pools: tuple[Pool, ...]
    """`prefill` and `decode`."""


class Accepted(_Answer):
    """A size that the server works towards."""

    name: str
    """The pool."""
    target_num_replicas: int
    """The size that the pool is to have."""


class HandoffReplica(_Answer):
    """One side of a hand-off."""

    replica_id: str | None = None
    """Name that Ray Serve gave it."""
    incarnation: str | None = None
    """Changes when the engine behind the same name is a new one."""


class HandoffRecord(_Answer):
    """One hand-off, as one gateway replica sees it. Times are unix seconds."""

    handoff_id: str
    """Name that the gateway gave it."""
    request_id: str | None = None
    """The request it belongs to; None when the gateway does not remember that."""
    tenant: str | None = None
    """Whose API key the request came with; None where clients need none."""
    prefill: HandoffReplica = HandoffReplica()
    """The replica that computed the KV."""
    decode: HandoffReplica | None = None
    """The replica that was to read it."""
    outcome: Literal["open", "consumed", "released", "rescued", "expired", "failed"] | str
    """What became of the KV."""
    reason: str | None = None
    """Why it was not consumed, in the gateway's words."""
    tokens: int = 0
    """Prompt tokens."""
    bytes: int = 0
    """Size of their KV."""
    produced_at: float | None = None
    """When the prefill engine had computed the KV."""
    ended_at: float | None = None
    """When the outcome was clear."""
    lease_left_s: float | None = None
    """Seconds that were left of the lease when the prefill engine stopped holding the KV."""
    stored_tokens: int = 0
    """Tokens of it that the shared cache took."""
    stored_bytes: int = 0
    """Bytes of it that the shared cache took."""
    reused_tokens: int = 0
    """Tokens of it that were loaded from the shared cache when it was first found there."""
    reused_at: float | None = None
    """When these tokens were loaded."""


class HandoffTotal(_Answer):
    """All hand-offs of one outcome."""

    count: int = 0
    """Hand-offs."""
    tokens: int = 0
    """Prompt tokens."""
    bytes: int = 0
    """Bytes of KV."""


class Handoffs(_Answer):
    """The books of one gateway replica since its start, and some of its records."""

    totals: dict[str, HandoffTotal]
    """By `produced`, each outcome, `stored` and `reused`."""
    num_open: int
    """Hand-offs that have no outcome yet."""
    balanced: bool
    """Whether produced = consumed + released + rescued + expired + failed + open."""
    records: tuple[HandoffRecord, ...] = ()
    """The newest first."""


class PoolState(_Answer):
    """The state of one pool, and why it is in it; as in `Pool`."""

    state: str
    reason: str | None = None


class Health(_Answer):
    """Whether the application answers requests."""

    status: Literal["ok", "degraded", "unavailable"] | str
    """`ok`: requests are served, by both pools. `degraded`: they are served by the replicas of one pool alone.
    `unavailable`: they are not."""
    reason: str | None = None
    """What keeps it from being `ok`, in words."""
    pools: dict[str, int] = {}
    """Routable replicas by pool."""
    states: dict[str, PoolState] = {}
    """The state of each pool."""

    @property
    def ok(self) -> bool:
        """Both pools serve requests."""
        return self.status == "ok"

    @property
    def serves(self) -> bool:
        """Requests are served, be it by decode replicas alone."""
        return self.status in ("ok", "degraded")
