# SPDX-License-Identifier: Apache-2.0
"""NIXL in push mode: the prefill engine writes the blocks into the decode engine's memory. Pure.

A decode engine registers its blocks with the prefill engine, which writes as soon as the prompt is computed. Both legs
may be sent at the same moment; the gateway's id of the hand-off names it on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transport.config import NixlConfig
from transport.descriptor import Feature, Legs, Limit, Listener, Statistics
from transport.facts import KV_ROLES, EngineFacts, Platform
from transport.handoff_params import HANDOFF_ID, REMOTE_PREFILL
from transport.kv_layouts import NIXL_LAYOUTS, Layouts


@dataclass(frozen=True)
class NixlPush:
    """Implements `transport.descriptor.Transport`."""

    config: NixlConfig

    name: ClassVar[str] = "nixl-push"
    legs: ClassVar[Legs] = "both_at_once"
    connector: ClassVar[str] = "NixlPushConnector"
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
        "hedging": Limit(
            "cannot work with NIXL in push mode, where both legs of a hand-off are bound to each other from the start",
            refused=True,
        ),
        "decode_pipeline": Limit("a NIXL decode engine cannot be split into pipeline stages", refused=True),
        "prefill_pipeline": Limit("NIXL push from an engine in pipeline stages is untested", refused=False),
        "prefill_pipeline_mamba": Limit(
            "NIXL in push mode cannot hand their states off from an engine in pipeline stages", refused=True
        ),
        "tensor_parallel": Limit("NIXL push between engines of several ranks is untested", refused=False),
    }
    layouts: ClassVar[Layouts] = NIXL_LAYOUTS

    @property
    def kv_lease_duration_s(self) -> int:
        return self.config.kv_lease_duration_s

    def child(self, facts: EngineFacts) -> dict[str, Any]:
        """The NixlPushConnector entry. The class is ours, under vLLM's name.

        Source:
            vLLM 0.32 `nixl/base_scheduler.py`, `nixl/base_worker.py`: keys of `kv_connector_extra_config`.
        """
        return {
            "kv_connector": self.connector,
            "kv_connector_module_path": "transport.in_engine.nixl_push.connector",
            "kv_role": KV_ROLES[facts.role],
            "kv_buffer_device": facts.platform,
            "kv_connector_extra_config": {
                "backends": list(self.config.backends),
                "kv_lease_duration": self.config.kv_lease_duration_s,
            },
        }

    def env(self, facts: EngineFacts) -> dict[str, str]:
        """Where this engine answers NIXL handshakes, and the question whether a hand-off is still to come.

        Also how it lays out the states of Mamba layers, if it has any.

        Source:
            vLLM 0.32 `nixl/base_worker.py` asserts this layout. On CPUs alone vLLM chooses it by itself.
        """
        return {
            "VLLM_SSM_CONV_STATE_LAYOUT": "DS",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": self._host(facts),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(facts.listener_port),
        }

    def listener(self, facts: EngineFacts) -> Listener | None:
        """The side channel of either engine: each makes a handshake with the other."""
        return Listener("nixl_handshake", self._host(facts), facts.listener_port)

    def source(self, facts: EngineFacts) -> dict[str, Any]:
        """The engine and its side channel, as parameters of a decode leg."""
        return {
            "remote_engine_id": facts.engine_id,
            "remote_host": self._host(facts),
            "remote_port": facts.listener_port,
            "tp_size": facts.tensor_parallel_size,
            "pp_size": facts.pipeline_parallel_size,
        }

    def prefill_params(self, handoff_id: str) -> dict[str, Any]:
        return {}

    def decode_params(self, handoff_id: str, found: Mapping[str, Any]) -> dict[str, Any]:
        return {**REMOTE_PREFILL, **found, "remote_request_id": handoff_id, HANDOFF_ID: handoff_id}

    def _host(self, facts: EngineFacts) -> str:
        return self.config.side_channel_host or facts.host
