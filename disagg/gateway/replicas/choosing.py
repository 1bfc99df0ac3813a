# SPDX-License-Identifier: Apache-2.0
"""Puts every choice of a replica to the one policy, over a snapshot of the membership. No other module picks a replica.

What has been tried and what is settled comes as constraints of the view. Belongs to the gateway's loop.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from disagg.gateway.replicas.membership import Membership
from disagg.gateway.replicas.reservation import Reservation
from disagg.routing.candidates import decodes
from disagg.routing.policy import Policy
from disagg.routing.views import Decision, RequestView, Snapshot


class Chooser:
    """The policy of one gateway replica, and the replicas that it chooses from."""

    def __init__(self, membership: Membership, policy: Policy, *, max_local_prefill_tokens: int) -> None:
        """Chooses from `membership` as it is at each call.

        Args:
            max_local_prefill_tokens: prompt tokens that a decode replica may compute at a time for this gateway.
        """
        self._membership = membership
        self._policy = policy
        self._max_local_prefill_tokens = max_local_prefill_tokens

    def reserve(self, request: RequestView) -> Reservation:
        """Decide, and hold what was chosen. The decision takes its turn, so that the next one looks elsewhere."""
        decision = self.decide(request)
        prefill, decode = self._membership.take_turn(decision.prefill_id, decision.decode_id)
        return Reservation(decision, prefill, decode, request.num_tokens if decision.mode == "local" else 0)

    def decide(self, request: RequestView) -> Decision:
        """What `reserve` would choose. Holds nothing and takes no turn."""
        return self._policy.choose(request, self._snapshot())

    def sparing(self, request: RequestView, replica_ids: Collection[str]) -> RequestView:
        """The request without these replicas as long as a decode replica is left for it, else as it is."""
        spared = replace(request, without=request.without.union(replica_ids))
        return spared if decodes(spared, self._snapshot()) else request

    def _snapshot(self) -> Snapshot:
        return self._membership.snapshot(max_local_prefill_tokens=self._max_local_prefill_tokens)
