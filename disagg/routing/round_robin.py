# SPDX-License-Identifier: Apache-2.0
"""The pair or replica that was chosen longest ago, whatever runs on it. Pure."""

from __future__ import annotations

from disagg.routing.candidates import decided
from disagg.routing.views import Decision, PairView, ReplicaView, RequestView, Snapshot


class RoundRobin:
    """Goes by turns alone; slow replicas have theirs only where there is no other one."""

    def choose(self, request: RequestView, snapshot: Snapshot) -> Decision:
        return decided(request, snapshot, pair_rank=_pair_rank, decode_rank=_decode_rank)


def _pair_rank(pair: PairView) -> tuple[bool, int, int, int]:
    """The turn is the pair's, so that each is used; among new pairs both sides change from one to the next."""
    prefill, decode = pair.prefill, pair.decode
    return prefill.slow or decode.slow, pair.last_chosen, prefill.last_chosen, decode.last_chosen


def _decode_rank(replica: ReplicaView) -> tuple[bool, int, str]:
    return replica.slow, replica.last_chosen, replica.replica_id
