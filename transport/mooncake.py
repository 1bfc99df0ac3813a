# SPDX-License-Identifier: Apache-2.0
"""MooncakeConnector as a child of MultiConnector: its entry in `kv_transfer_config` and its environment. Pure.

Nothing about a hand-off comes back from a prefill engine: the gateway chooses its `transfer_id`, and finds the producer
by its bootstrap URL. Both legs may be sent at the same moment.
"""

from __future__ import annotations

from typing import Any

from transport.config import MooncakeConfig
from transport.facts import EngineFacts

_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


def mooncake_child(config: MooncakeConfig, facts: EngineFacts) -> dict[str, Any]:
    """The MooncakeConnector entry for one engine, JSON-able. The class is ours, under vLLM's name.

    Source:
        vLLM 0.32 `mooncake/mooncake_connector.py`: keys of `kv_connector_extra_config`. With
        `bootstrap_server_address` vLLM starts no bootstrap server, which would listen on every address of the node; the
        prefill engine's own class starts one there.
    """
    extra: dict[str, Any] = {
        "mooncake_protocol": config.protocol,
        "device_name": config.device_name or "",
        "num_workers": config.num_workers,
    }
    if facts.role == "prefill":
        host = f"[{facts.host}]" if ":" in facts.host else facts.host
        extra["bootstrap_server_address"] = f"{host}:{facts.bootstrap_port}"
    return {
        "kv_connector": "MooncakeConnector",
        "kv_connector_module_path": "transport.in_engine.mooncake.connector",
        "kv_role": _KV_ROLES[facts.role],
        "kv_buffer_device": facts.platform,
        "kv_connector_extra_config": extra,
    }


def mooncake_env(config: MooncakeConfig, facts: EngineFacts) -> dict[str, str]:
    """Mooncake's address and time limits. vLLM reads them process-wide, so set them before vLLM starts.

    The side channel listens on `VLLM_HOST_IP`, which is also what an engine tells its peers.
    """
    return {
        "VLLM_HOST_IP": facts.host,
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(config.kv_lease_duration_s),
        "VLLM_MOONCAKE_CONNECTOR_TIMEOUT": str(config.connector_timeout_s),
    }
