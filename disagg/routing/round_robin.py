# SPDX-License-Identifier: Apache-2.0
"""The pair or replica that was chosen longest ago, whatever runs on it. Pure."""

from __future__ import annotations

from operator import attrgetter

from disagg.routing.candidates import decided
from disagg.routing.views import Decision, RequestView, Snapshot

_PAIR_RANK = attrgetter("slow", "last_chosen", "prefill.last_chosen", "decode.last_chosen")
"""Pairs take turns, so that each pair is used. Among new pairs, both replicas change from one decision to the next."""

_DECODE_RANK = attrgetter("slow", "last_chosen", "replica_id")


class RoundRobin:
    """Lets pairs and replicas take turns; a slow one is chosen only when there is no other."""

    def choose(self, request: RequestView, snapshot: Snapshot) -> Decision:
        return decided(request, snapshot, pair_rank=_PAIR_RANK, decode_rank=_DECODE_RANK)
