# SPDX-License-Identifier: Apache-2.0
"""What travels between the two sides of our MultiConnector, beside what its children exchange."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiKVConnectorMetadata,
    MultiKVConnectorWorkerMetadata,
)

from transport.in_engine.outer.holds import merge_ended
from transport.in_engine.protocols import Ended


@dataclass
class HandoffMetadata(MultiKVConnectorMetadata):
    """Scheduler to every rank."""

    settled: set[str] = field(default_factory=set)
    """Request ids whose lease every rank is to forget."""


@dataclass
class HandoffWorkerMetadata(MultiKVConnectorWorkerMetadata):
    """One rank, or several together, to the scheduler."""

    ended: Ended = field(default_factory=dict)
    """Holds that ended on these ranks in this step."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, HandoffWorkerMetadata)
        children = super().aggregate(other).metadata
        return HandoffWorkerMetadata(metadata=children, ended=merge_ended(self.ended, other.ended))
