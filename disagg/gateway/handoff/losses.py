# SPDX-License-Identifier: Apache-2.0
"""The decode replicas that one request was lost on, over all that is tried for it, resumes included. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Losses:
    """Filled in as the request is tried."""

    replica_ids: set[str] = field(default_factory=set)
    """Not to be chosen while there are others."""
    kv_fit: str = ""
    """Of the replica that broke off with the stream; one with another may have other weights and go on with another
    answer."""
    count: int = 0
    """How often a replica that may have had the request was lost, bounded by `gateway.max_attempts`."""

    _broken: set[str] = field(default_factory=set)

    def add_stream(self, replica_id: str, kv_fit: str = "") -> None:
        """A replica broke off with the answer under way; each time counts, for it had worked before."""
        self.kv_fit = kv_fit
        self.replica_ids.add(replica_id)
        self._broken.add(replica_id)
        self.count += 1

    def add(self, replica_id: str, *, had_it: bool = True) -> None:
        """A replica broke off or answered 5xx before anything was shown.

        One that was lost before does so until its process ends: that breaks nothing more. `had_it`: whether it may have
        had the request.
        """
        self.replica_ids.add(replica_id)
        if had_it and replica_id not in self._broken:
            self._broken.add(replica_id)
            self.count += 1
