# SPDX-License-Identifier: Apache-2.0
"""Adapter from Ray Serve's `RequestRouter` to the gateway's membership: tells who is alive, routes nothing.

Serve pushes each change of a deployment's replicas to every router of it, with what `record_replica_metadata`
published. Requests do not go through this router; the gateway talks HTTP to the replicas.
"""

from __future__ import annotations

import logging

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

logger = logging.getLogger(__name__)


class ReplicaRouter(RequestRouter):
    """Reports the replicas of its deployment to `disagg.routing.feed`."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        return [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        # Serve pickles this module by value. The feed is imported here, so that all copies share one feed.
        from disagg.routing import feed

        try:
            published = {r.replica_id.unique_id: r.replica_metadata for r in replicas if r.replica_metadata}
            feed.report(self._deployment_id.name, published)
        except Exception:
            # An exception here would stop Serve's router for good.
            logger.exception("a change of replicas could not be taken over")
