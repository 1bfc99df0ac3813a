# SPDX-License-Identifier: Apache-2.0
"""Which replicas and pairs a request may have, and the frame of a decision, which a policy fills with ranks. Pure.

This module applies what a request rules out, for all policies: a policy orders the candidates and adds none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from disagg.routing.views import Decision, Mode, PairView, ReplicaView, RequestView, Snapshot

NO_WARM_PAIR = "no_warm_pair"
NO_ROOM = "no_room"
NO_REPLICA = "no_replica"
NO_DECODE = "no_decode_replica"
OTHER_KV_FIT = "other_kv_fit"
"""There are replicas, and all have another model or other engine arguments."""


def pairs(request: RequestView, snapshot: Snapshot) -> list[PairView]:
    """The warm pairs that may take a hand-off of the request."""
    decodes = [replica for replica in snapshot.decode if _allowed(request, replica)]
    without, chosen = request.without, snapshot.pairs_chosen
    return [
        PairView(
            prefill,
            decode,
            chosen.get((prefill.replica_id, decode.replica_id), 0),
            prefill.slow or decode.slow,
        )
        for prefill in snapshot.prefill
        if prefill.replica_id not in without
        for decode in decodes
        if decode.replica_id in prefill.warm_peers
    ]


def alone(request: RequestView, snapshot: Snapshot) -> tuple[Mode, list[ReplicaView]]:
    """Who may answer the request alone, whether or not they have room: replicas of one pool, and the mode for it.

    A prefill engine is a whole engine, so prefill replicas answer where no regular decode replica may. Decode replicas
    of last resort come after them. Among these, draining replicas are returned only when all of them drain.
    """
    regular = [replica for replica in snapshot.decode if _allowed(request, replica)]
    if regular:
        return "local", regular
    if "prefill" not in request.ruled_out and request.decode_id is None and snapshot.max_prefill_alone_tokens:
        prefills = [replica for replica in snapshot.prefill if _allowed(request, replica)]
        if prefills:
            return "prefill", prefills
    last = [replica for replica in snapshot.last_resort if _allowed(request, replica)]
    return "local", [replica for replica in last if not replica.draining] or last


def has_room(replica: ReplicaView, num_tokens: int, *, limit: int) -> bool:
    """Whether a replica may compute `num_tokens` more. A replica that computes none always may, however many."""
    taken = replica.local_prefill_tokens
    return taken == 0 or taken + num_tokens <= limit


def decided(
    request: RequestView,
    snapshot: Snapshot,
    *,
    pair_rank: Callable[[PairView], Any],
    decode_rank: Callable[[ReplicaView], Any],
) -> Decision:
    """A hand-off where the request and the pairs allow one, else a decode replica alone, else a prefill replica alone.

    Args:
        pair_rank: orders pairs; the lowest is chosen, and the first among equals.
        decode_rank: orders replicas that answer alone, of either pool.
    """
    ruled_out = request.ruled_out
    why = ruled_out.get("handoff")
    if why is None or "primed" not in ruled_out:
        found = pairs(request, snapshot)
        if found:
            pair = min(found, key=pair_rank)
            prefill_id, decode_id = pair.prefill.replica_id, pair.decode.replica_id
            if why is None:
                return Decision("handoff", (), prefill_id, decode_id, tuple(found))
            return Decision("primed", (why,), prefill_id, decode_id, tuple(found))
        why = NO_WARM_PAIR
    if "local" in ruled_out:
        return Decision("none", (why,))
    mode, replicas = alone(request, snapshot)
    if not replicas:
        return Decision("none", (why, _nobody(request, snapshot)))
    if request.needs_room:
        limit = snapshot.max_local_prefill_tokens if mode == "local" else snapshot.max_prefill_alone_tokens
        roomy = [replica for replica in replicas if has_room(replica, request.num_tokens, limit=limit)]
    else:
        roomy = replicas
    if not roomy:
        return Decision("none", (why, NO_ROOM), candidates=tuple(replicas))
    chosen = min(roomy, key=decode_rank).replica_id
    if mode == "prefill":
        return Decision("prefill", (why, NO_DECODE), chosen, None, tuple(replicas))
    return Decision("local", (why,), None, chosen, tuple(replicas))


def _allowed(request: RequestView, replica: ReplicaView) -> bool:
    return (
        replica.replica_id not in request.without
        and request.decode_id in (None, replica.replica_id)
        and request.kv_fit in (None, replica.kv_fit)
    )


def _nobody(request: RequestView, snapshot: Snapshot) -> str:
    known = (*snapshot.decode, *snapshot.last_resort, *snapshot.prefill)
    others = [replica for replica in known if request.kv_fit not in (None, replica.kv_fit)]
    return OTHER_KV_FIT if others else NO_REPLICA
