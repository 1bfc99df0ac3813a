# SPDX-License-Identifier: Apache-2.0
"""The clients of all replicas that a gateway speaks to, and one `sweep` that watches the exchanges of all of them."""

from __future__ import annotations

from pools.client.replica import LegObserver, Limits, ReplicaClient


class ReplicaClients:
    """Makes clients, and watches each until it is closed and its last exchange is over. Belongs to one event loop."""

    def __init__(self, *, connect_timeout_s: float, limits: Limits, observer: LegObserver | None) -> None:
        """`observer` is told of every leg of every client."""
        self._connect_timeout_s = connect_timeout_s
        self._limits = limits
        self._observer = observer
        self._clients: set[ReplicaClient] = set()

    def of(self, url: str, *, key: str | None) -> ReplicaClient:
        """A new client. Arguments are those of `ReplicaClient`; nothing is connected to yet."""
        client = ReplicaClient(url, key=key, connect_timeout_s=self._connect_timeout_s, observer=self._observer)
        self._clients.add(client)
        return client

    def sweep(self, now: float) -> None:
        """Fail exchanges that have stood still too long, also those of closed clients. Call it often.

        `now` is the loop's time.
        """
        for client in list(self._clients):
            client.sweep(now, self._limits)
            if client.is_over:
                self._clients.discard(client)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()
