# SPDX-License-Identifier: Apache-2.0
"""The replicas that one request has lost, over all tries for it, resumes included. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Losses:
    """Filled in as the request is tried."""

    replica_ids: set[str] = field(default_factory=set)
    """Not to be chosen while there are others."""
    kv_fit: str = ""
    """`kv_fit` of the replica that broke off with the stream. A replica with another one may have other weights, and go
    on with another answer."""
    count: int = 0
    """How often a replica that may have had the request was lost, bounded by `gateway.max_attempts`."""

    _broken: set[str] = field(default_factory=set)

    def add_stream(self, replica_id: str, kv_fit: str = "") -> None:
        """Count a replica that broke off in the middle of a stream. Each time counts: the replica had worked before."""
        self.kv_fit = kv_fit
        self.replica_ids.add(replica_id)
        self._broken.add(replica_id)
        self.count += 1

    def add(self, replica_id: str, *, had_it: bool = True) -> None:
        """Note a replica that broke off or answered 5xx before the client had anything.

        A replica that the request has lost before is not counted again: it goes on failing until its process ends.
        `had_it`: whether the request may have reached the replica; if not, the loss is not counted either.
        """
        self.replica_ids.add(replica_id)
        if had_it and replica_id not in self._broken:
            self._broken.add(replica_id)
            self.count += 1
