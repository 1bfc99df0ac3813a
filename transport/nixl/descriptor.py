# SPDX-License-Identifier: Apache-2.0
"""NIXL in pull mode: the decode engine reads the blocks out of the prefill engine's memory. Pure.

A prefill leg's answer says where the blocks are. The gateway passes it on to the decode engine as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transport.config import NixlConfig
from transport.descriptor import Feature, Legs, Limit, Listener, Statistics
from transport.facts import KV_ROLES, EngineFacts, Platform
from transport.handoff_params import HANDOFF_ID
from transport.kv_layouts import NIXL_LAYOUTS, Layouts

_NO_STAGES = Limit("NIXL in pull mode cannot hand their KV off from an engine in pipeline stages", refused=True)
"""Source: vLLM 0.32 `NixlBaseConnectorWorker.__init__`."""


@dataclass(frozen=True)
class Nixl:
    """Implements `transport.descriptor.Transport`."""

    config: NixlConfig

    name: ClassVar[str] = "nixl"
    legs: ClassVar[Legs] = "prefill_first"
    connector: ClassVar[str] = "NixlConnector"
    statistics: ClassVar[Statistics] = Statistics(
        bytes="nixl_bytes_transferred",
        cases={
            "nixl_num_failed_transfers": ("num_failed_transfers", "num_failed_handshakes"),
            "nixl_num_failed_notifications": ("num_failed_notifications",),
            "num_kv_expired_reqs": ("num_kv_expired_reqs",),
            "num_notifications_after_expiry": ("num_notifications_after_expiry",),
        },
    )
    module: ClassVar[str] = "nixl"
    packages: ClassVar[Mapping[Platform, str]] = {"cpu": "nixl", "cuda": "nixl"}
    limits: ClassVar[Mapping[Feature, Limit]] = {
        "decode_pipeline": Limit("a NIXL decode engine cannot be split into pipeline stages", refused=True),
        "prefill_pipeline": Limit("NIXL hand-off from an engine in pipeline stages is untested", refused=False),
        "prefill_pipeline_sliding_window": _NO_STAGES,
        "prefill_pipeline_mamba": _NO_STAGES,
    }
    layouts: ClassVar[Layouts] = NIXL_LAYOUTS

    @property
    def kv_lease_duration_s(self) -> int:
        return self.config.kv_lease_duration_s

    def child(self, facts: EngineFacts) -> dict[str, Any]:
        """The NixlConnector entry.

        Source:
            vLLM 0.32 `nixl/base_scheduler.py`, `nixl/base_worker.py`: keys of `kv_connector_extra_config`.
        """
        return {
            "kv_connector": self.connector,
            "kv_connector_module_path": "transport.in_engine.nixl.connector",
            "kv_role": KV_ROLES[facts.role],
            "kv_buffer_device": facts.platform,
            "kv_connector_extra_config": {
                "backends": list(self.config.backends),
                "kv_lease_duration": self.config.kv_lease_duration_s,
            },
        }

    def env(self, facts: EngineFacts) -> dict[str, str]:
        """Where this engine answers NIXL handshakes, and how it lays out the states of Mamba layers, if it has any.

        Source:
            vLLM 0.32 `nixl/base_worker.py` asserts this layout. On CPUs alone vLLM chooses it by itself.
        """
        return {
            "VLLM_SSM_CONV_STATE_LAYOUT": "DS",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": self._host(facts),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(facts.listener_port),
        }

    def listener(self, facts: EngineFacts) -> Listener | None:
        """The side channel of a prefill engine. A decode engine has one too, but nobody asks anything there."""
        if facts.role == "decode":
            return None
        return Listener("nixl_handshake", self._host(facts), facts.listener_port)

    def source(self, facts: EngineFacts) -> dict[str, Any]:
        return {}

    def prefill_params(self, handoff_id: str) -> dict[str, Any]:
        return {}

    def decode_params(self, handoff_id: str, found: Mapping[str, Any]) -> dict[str, Any]:
        return {**found, HANDOFF_ID: handoff_id}

    def _host(self, facts: EngineFacts) -> str:
        return self.config.side_channel_host or facts.host
