# SPDX-License-Identifier: Apache-2.0
"""Mooncake: the prefill engine writes the blocks into the decode engine's memory. Pure.

Nothing about a hand-off comes back from a prefill engine: the gateway chooses its `transfer_id`, and the decode engine
finds the producer by its bootstrap URL. Both legs may be sent at the same moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transport.config import MooncakeConfig
from transport.descriptor import Feature, Legs, Limit, Listener, Statistics
from transport.facts import KV_ROLES, EngineFacts, Platform
from transport.handoff_params import HANDOFF_ID, REMOTE_PREFILL
from transport.kv_layouts import MLA_ON_CPU, NO_ENCODER_DECODER, Layouts, on_both

_PIPELINE = Limit("Mooncake hand-off with an engine in pipeline stages is untested", refused=False)


@dataclass(frozen=True)
class Mooncake:
    """Implements `transport.descriptor.Transport`."""

    config: MooncakeConfig

    name: ClassVar[str] = "mooncake"
    legs: ClassVar[Legs] = "both_at_once"
    connector: ClassVar[str] = "MooncakeConnector"
    statistics: ClassVar[Statistics] = Statistics(
        bytes="mooncake_bytes_transferred",
        cases={
            "mooncake_num_failed_transfers": ("num_failed_transfers", "num_failed_recvs"),
            "num_kv_expired_reqs": ("num_kv_expired_reqs",),
        },
    )
    module: ClassVar[str] = "mooncake"
    packages: ClassVar[Mapping[Platform, str]] = {
        "cpu": "mooncake-transfer-engine-non-cuda",
        "cuda": "mooncake-transfer-engine-cuda13",
    }
    limits: ClassVar[Mapping[Feature, Limit]] = {
        "hedging": Limit(
            "cannot work with transport mooncake, where both legs of a hand-off are bound to each other from the start",
            refused=True,
        ),
        "prefill_pipeline": _PIPELINE,
        "decode_pipeline": _PIPELINE,
    }
    layouts: ClassVar[Layouts] = on_both(
        cpu={"mla_attention": MLA_ON_CPU, "cross_attention": NO_ENCODER_DECODER},
        cuda={"cross_attention": NO_ENCODER_DECODER},
    )

    @property
    def kv_lease_duration_s(self) -> int:
        return self.config.kv_lease_duration_s

    def child(self, facts: EngineFacts) -> dict[str, Any]:
        """The MooncakeConnector entry. The class is ours, under vLLM's name.

        Source:
            vLLM 0.32 `mooncake/mooncake_connector.py`: keys of `kv_connector_extra_config`. With
            `bootstrap_server_address` vLLM does not start its own bootstrap server, which would listen on every address
            of the node. Our worker class starts one at the address instead.
        """
        extra: dict[str, Any] = {
            "mooncake_protocol": self.config.protocol,
            "device_name": self.config.device_name or "",
            "num_workers": self.config.num_workers,
        }
        if (bootstrap := self.listener(facts)) is not None:
            extra["bootstrap_server_address"] = bootstrap.url.removeprefix("http://")
        return {
            "kv_connector": self.connector,
            "kv_connector_module_path": "transport.in_engine.mooncake.connector",
            "kv_role": KV_ROLES[facts.role],
            "kv_buffer_device": facts.platform,
            "kv_connector_extra_config": extra,
        }

    def env(self, facts: EngineFacts) -> dict[str, str]:
        """Mooncake's address and time limits.

        The side channel listens on `VLLM_HOST_IP`, which is also what an engine tells its peers.
        """
        return {
            "VLLM_HOST_IP": facts.host,
            "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(self.config.kv_lease_duration_s),
            "VLLM_MOONCAKE_CONNECTOR_TIMEOUT": str(self.config.connector_timeout_s),
        }

    def listener(self, facts: EngineFacts) -> Listener | None:
        """The bootstrap server of a prefill engine."""
        return None if facts.role == "decode" else Listener("http_query", facts.host, facts.listener_port)

    def source(self, facts: EngineFacts) -> dict[str, Any]:
        """The engine's id and the URL of its bootstrap server, which has the id from the same setting."""
        bootstrap = self.listener(facts)
        if bootstrap is None:
            return {}
        return {"remote_engine_id": facts.engine_id, "remote_bootstrap_addr": bootstrap.url}

    def prefill_params(self, handoff_id: str) -> dict[str, Any]:
        return {"transfer_id": handoff_id}

    def decode_params(self, handoff_id: str, found: Mapping[str, Any]) -> dict[str, Any]:
        return {**REMOTE_PREFILL, **found, "transfer_id": handoff_id, HANDOFF_ID: handoff_id}
