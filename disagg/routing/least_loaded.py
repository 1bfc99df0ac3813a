# SPDX-License-Identifier: Apache-2.0
"""The least-loaded pair or replica, and among equals the one that has waited longest. Pure."""

from __future__ import annotations

from disagg.routing.candidates import decided
from disagg.routing.views import Decision, PairView, ReplicaView, RequestView, Snapshot


class LeastLoaded:
    """Goes by what this gateway has running on each replica."""

    def choose(self, request: RequestView, snapshot: Snapshot) -> Decision:
        return decided(request, snapshot, pair_rank=_pair_rank, decode_rank=_decode_rank)


def _pair_rank(pair: PairView) -> tuple[bool, int, int, int, int]:
    """Pairs with a slow replica come last. Then prefill load comes first, because it decides the first token.

    The last-chosen tie-break is over pairs and not over replicas: taking turns on each side alone would use only two of
    four pairs.
    """
    prefill, decode = pair.prefill, pair.decode
    return (
        prefill.slow or decode.slow,
        prefill.num_in_flight,
        decode.num_in_flight,
        pair.last_chosen,
        decode.last_chosen,
    )


def _decode_rank(replica: ReplicaView) -> tuple[bool, int, int, int, str]:
    """The prompts that it computes already come first, because they decide the first token."""
    return (
        replica.slow,
        replica.local_prefill_tokens,
        replica.num_in_flight,
        replica.last_chosen,
        replica.replica_id,
    )
