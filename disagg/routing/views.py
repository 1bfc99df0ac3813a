# SPDX-License-Identifier: Apache-2.0
"""What a routing policy looks at and what it answers: frozen values, no handles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import msgspec


@dataclass(frozen=True)
class ReplicaInfo:
    """One replica as it published itself, fixed for its incarnation."""

    replica_id: str
    pool: str
    url: str
    engine_id: str
    incarnation: str
    block_size: int
    """Tokens in one KV block of its engine."""
    vocab_size: int
    """Every token id is below this number."""
    kv_source: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Where a decode engine finds the KV of this (prefill) engine. The transport writes and reads this value; see
    `transport.descriptor`. Empty when the transport says it with each hand-off instead."""
    lmcache_http_url: str | None = None
    """HTTP API of the LMCache server that its engine uses: status and metrics. None without one, or when unknown."""
    kv_fit: str = ""
    """Equal for replicas whose engines compute and lay out KV alike; see `pools.replica.kv_digest`."""
    secret: str | None = field(default=None, repr=False)
    """Key that the replica's private HTTP requires. It is in no log and in no answer of the gateway."""

    @classmethod
    def from_metadata(cls, replica_id: str, metadata: Mapping[str, Any]) -> Self:
        """From what a replica published (`record_replica_metadata`); what this version does not know is left out.

        Raises ValueError, which names the field and none of the values, when a field is missing or has another type.
        """
        return msgspec.convert({**metadata, "replica_id": replica_id}, cls)

    @classmethod
    def unknown_fields(cls, metadata: Mapping[str, Any]) -> frozenset[str]:
        """Names of the fields that a replica published and this version does not know."""
        return frozenset(metadata) - {known.name for known in fields(cls)}


Endpoint = Literal["chat", "completions"]

Mode = Literal["handoff", "primed", "local", "prefill", "none"]
"""Who makes the answer.

`handoff`: prefill computes the prompt, decode reads its KV. `primed`: as before, but a probe reads the KV into decode's
prefix cache first, for requests that fan out over it. `local`: decode computes the prompt itself. `prefill`: a prefill
replica answers alone, because no decode replica can. `none`: nobody.
"""


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request as a policy sees it: what it is, and what is ruled out for it. No handles."""

    endpoint: Endpoint
    prompts: Sequence[Sequence[int]] | None
    """Token ids of each prompt; None when the request could not be rendered."""
    num_tokens: int
    """Prompt tokens that a decode engine computes where nothing is handed off; an estimate without `prompts`."""
    ruled_out: Mapping[Mode, str]
    """The modes that this request cannot have, each with the word for why. See `disagg.routing.constraints`."""
    cache_salt: str | None = None
    """Requests share cached KV only with those of the same salt."""
    without: frozenset[str] = frozenset()
    """Ids of replicas that are not to be chosen: they were tried."""
    decode_id: str | None = None
    """The only decode replica that may be chosen; None when any may, and a prefill replica in place of all of them."""
    kv_fit: str | None = None
    """The only `ReplicaInfo.kv_fit` that the decode replica may have; None when it may have any."""
    needs_room: bool = True
    """Whether the request is refused when no replica that could answer it alone has room for its prompt."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica at the moment of a decision."""

    replica_id: str
    num_in_flight: int
    """Legs this gateway has running there."""
    last_chosen: int
    """Sequence number of the last decision that took it; 0 before the first."""
    local_prefill_tokens: int = 0
    """Prompt tokens that it computes for this gateway without a hand-off, for requests that it answers alone."""
    slow: bool = False
    """It works, but far slower than the best of its pool."""
    draining: bool = False
    """The replica says that it leaves the pool. Only replicas of last resort can be in this state."""
    kv_fit: str = ""
    """As in `ReplicaInfo`."""
    warm_peers: frozenset[str] = frozenset()
    """Ids of the replicas of the other pool with which this one has moved KV."""


@dataclass(frozen=True, slots=True)
class PairView:
    """A prefill and a decode replica that have moved KV between them."""

    prefill: ReplicaView
    decode: ReplicaView
    last_chosen: int
    """Sequence number of the last decision that took both together; 0 before the first."""
    slow: bool = False
    """Whether one of the two is slow."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The replicas that may serve, at the moment of a decision. The gateway has checked before who may."""

    prefill: tuple[ReplicaView, ...]
    decode: tuple[ReplicaView, ...]
    last_resort: tuple[ReplicaView, ...] = ()
    """Decode replicas that serve only where no other one can: those that leave and those on probation."""
    pairs_chosen: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Sequence number of the last decision for a prefill and a decode replica; pairs without one are absent."""
    max_local_prefill_tokens: int = 2**63
    """Prompt tokens that one decode replica may compute at a time for this gateway."""
    max_prefill_alone_tokens: int = 2**63
    """Prompt tokens that one prefill replica may compute at a time for requests that it answers alone."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How one request is answered, by whom, and why."""

    mode: Mode
    reasons: tuple[str, ...] = ()
    """Words from a fixed set, used as metric labels. The first says why nothing is handed off as usual. In mode
    `none` the last says why nobody serves the request."""
    prefill_id: str | None = None
    decode_id: str | None = None
    candidates: tuple[PairView | ReplicaView, ...] = ()
    """All that was weighed against each other, the chosen one included: pairs, or replicas of one pool."""

    @property
    def reason(self) -> str:
        """Why nothing is handed off as usual; empty for a hand-off."""
        return self.reasons[0] if self.reasons else ""

    @property
    def refusal(self) -> str | None:
        """Why nobody serves it; None when somebody does."""
        return self.reasons[-1] if self.mode == "none" else None

    @property
    def alone_id(self) -> str | None:
        """The replica that answers alone; None for a hand-off, and when nobody answers."""
        return {"local": self.decode_id, "prefill": self.prefill_id}.get(self.mode)

    @property
    def not_chosen(self) -> tuple[PairView | ReplicaView, ...]:
        """The candidates that were not chosen."""
        return tuple(candidate for candidate in self.candidates if not self._is_chosen(candidate))

    def has_other_prefill(self, *, decode_id: str | None = None) -> bool:
        """Whether another prefill replica could take the hand-off, with any decode replica or with `decode_id`."""
        return any(
            isinstance(pair, PairView)
            and pair.prefill.replica_id != self.prefill_id
            and decode_id in (None, pair.decode.replica_id)
            for pair in self.candidates
        )

    def _is_chosen(self, candidate: PairView | ReplicaView) -> bool:
        if isinstance(candidate, PairView):
            return (candidate.prefill.replica_id, candidate.decode.replica_id) == (self.prefill_id, self.decode_id)
        return candidate.replica_id == self.alone_id
