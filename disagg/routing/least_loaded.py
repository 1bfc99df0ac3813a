# SPDX-License-Identifier: Apache-2.0
"""The least-loaded pair or replica, and among equals the one that has waited longest. Pure."""

from __future__ import annotations

from operator import attrgetter

from disagg.routing.candidates import decided
from disagg.routing.views import Decision, RequestView, Snapshot

_PAIR_RANK = attrgetter("slow", "prefill.num_in_flight", "decode.num_in_flight", "last_chosen", "decode.last_chosen")
"""Pairs with a slow replica come last. Then prefill load comes first, because it decides the first token.

The last-chosen tie-break is over pairs and not over replicas: taking turns on each side alone would use only two of
four pairs.
"""

_DECODE_RANK = attrgetter("slow", "local_prefill_tokens", "num_in_flight", "last_chosen", "replica_id")
"""Slow replicas come last. Then the prompt tokens that a replica already computes count first, because they decide how
long the first token takes."""


class LeastLoaded:
    """Goes by what this gateway has running on each replica."""

    def choose(self, request: RequestView, snapshot: Snapshot) -> Decision:
        return decided(request, snapshot, pair_rank=_PAIR_RANK, decode_rank=_DECODE_RANK)
