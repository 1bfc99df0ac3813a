# SPDX-License-Identifier: Apache-2.0
"""From `transport.type` to the way its hand-offs go."""

from __future__ import annotations

from typing import Literal

from disagg.gateway.handoff.transfer import Transfer
from disagg.gateway.handoff.transfer_pull import Pull
from disagg.gateway.handoff.transfer_push import Push
from pools.client.http1 import Upstreams

TransportType = Literal["nixl", "mooncake"]


def transfer_for(transport: TransportType, upstreams: Upstreams) -> Transfer:
    """The transfer of one transport; `upstreams` carries what it has to ask of the engines."""
    return Push(upstreams) if transport == "mooncake" else Pull()
