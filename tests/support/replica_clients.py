# SPDX-License-Identifier: Apache-2.0
"""Members of the pools without engines: their clients lead nowhere, and connect to nothing unless they are used."""

from __future__ import annotations

import time
from collections.abc import Callable

from disagg.gateway.replicas.membership import Member, Membership
from disagg.routing.views import ReplicaInfo
from pools.client.replica import ReplicaClient


def lonely_client(info: ReplicaInfo) -> ReplicaClient:
    """A client at whose address nobody listens."""
    return ReplicaClient("http://127.0.0.1:1", key=info.secret, connect_timeout_s=1, observer=None)


def lonely_member(info: ReplicaInfo) -> Member:
    return Member(info, lonely_client(info))


def lonely_membership(
    on_change: Callable[[], None] = lambda: None,
    *,
    clock: Callable[[], float] = time.monotonic,
    prefill_alone: bool = True,
) -> Membership:
    """Arguments are those of `Membership`."""
    return Membership(lonely_client, on_change, clock=clock, prefill_alone=prefill_alone)
