# SPDX-License-Identifier: Apache-2.0
"""Events of engines on their way into a ledger, as they come over the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from disagg.gateway.ledger.ledger import Ledger
from disagg.routing.views import ReplicaInfo
from pools.client.events import read_events


def told(ledger: Ledger, replica: ReplicaInfo, event: Mapping[str, Any]) -> None:
    """Give a ledger one event, read as the feed reads it."""
    batch = read_events(json.dumps({"incarnation": "i", "next": 1, "lost": 0, "events": [event]}).encode())
    ledger.malformed(batch.num_malformed)
    for read in batch.events:
        ledger.apply(replica, read)
