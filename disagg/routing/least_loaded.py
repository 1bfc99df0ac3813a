# SPDX-License-Identifier: Apache-2.0
"""The least-loaded pair, and among equals the one that has waited longest. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from disagg.routing.views import PairView, ReplicaView


def choose_pair(pairs: Iterable[PairView]) -> PairView | None:
    """The pair for the next hand-off, or None without pairs.

    Pairs with a slow replica come last. Then prefill load comes first, because it decides the first token. The
    last-chosen tie-break is over pairs and not over replicas: taking turns on each side alone would use only two of
    four pairs.
    """
    return min(
        pairs,
        key=lambda p: (
            p.prefill.slow or p.decode.slow,
            p.prefill.num_in_flight,
            p.decode.num_in_flight,
            p.last_chosen,
            p.decode.last_chosen,
        ),
        default=None,
    )


def choose_decode(replicas: Iterable[ReplicaView]) -> ReplicaView | None:
    """The decode replica for a request without a hand-off, or None without replicas.

    The prompts it computes already come first, because they decide the first token.
    """
    return min(
        replicas,
        key=lambda r: (r.slow, r.local_prefill_tokens, r.num_in_flight, r.last_chosen, r.replica_id),
        default=None,
    )
