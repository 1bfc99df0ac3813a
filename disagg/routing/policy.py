# SPDX-License-Identifier: Apache-2.0
"""What a routing policy is: a plain function of values. Each policy has a file; `policies` builds them by name."""

from __future__ import annotations

from typing import Protocol

from disagg.routing.views import Decision, RequestView, Snapshot


class Policy(Protocol):
    """Chooses how and where one request is answered."""

    def choose(self, request: RequestView, snapshot: Snapshot) -> Decision:
        """The decision for a request. Pure: the same values give the same decision, and turns are in the snapshot.

        It names only replicas of the snapshot, and none that the request rules out. Runs for each request in the
        gateway's loop, so it takes microseconds.
        """
        ...
