# SPDX-License-Identifier: Apache-2.0
"""What a routing policy may look at: frozen snapshots, no handles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    """Token ids are below it."""
    kv_source: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Where a decode engine finds the KV of this (prefill) engine, in the words of its transport, which reads it again;
    see `transport.descriptor`. Empty for an engine whose transport says it with each hand-off."""
    lmcache_http_url: str | None = None
    """HTTP API of the LMCache server that its engine uses: status and metrics. None without one, or when unknown."""
    kv_fit: str = ""
    """Equal for replicas whose engines compute and lay out KV alike; see `pools.replica.kv_digest`."""
    secret: str | None = field(default=None, repr=False)
    """Key that its private HTTP asks for. In no log and in no answer of the gateway."""


@dataclass(frozen=True)
class ReplicaView:
    """One replica at the moment of a decision."""

    replica_id: str
    num_in_flight: int
    """Legs this gateway has running there."""
    last_chosen: int
    """Sequence number of the last decision that took it; 0 before the first."""
    local_prefill_tokens: int = 0
    """Prompt tokens that it computes for this gateway without a hand-off."""
    slow: bool = False
    """It works, but far slower than the best of its pool."""


@dataclass(frozen=True)
class PairView:
    """A prefill and a decode replica that have moved KV between them."""

    prefill: ReplicaView
    decode: ReplicaView
    last_chosen: int
