# SPDX-License-Identifier: Apache-2.0
"""NIXL as a child of MultiConnector: its entry in `kv_transfer_config` and its environment. Pure.

The child carries no `engine_id`: vLLM hands the outer one down and refuses a second.
"""

from __future__ import annotations

from typing import Any

from transport.config import NixlConfig
from transport.facts import EngineFacts

_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


def nixl_child(config: NixlConfig, facts: EngineFacts) -> dict[str, Any]:
    """The NixlConnector entry for one engine, JSON-able.

    Source:
        vLLM 0.32 `nixl/base_scheduler.py`, `nixl/base_worker.py`: keys of `kv_connector_extra_config`.
    """
    return {
        "kv_connector": "NixlConnector",
        "kv_connector_module_path": "transport.in_engine.nixl.connector",
        "kv_role": _KV_ROLES[facts.role],
        "kv_buffer_device": facts.platform,
        "kv_connector_extra_config": {
            "backends": list(config.backends),
            "kv_lease_duration": config.kv_lease_duration_s,
        },
    }


def nixl_env(config: NixlConfig, facts: EngineFacts) -> dict[str, str]:
    """Where this engine answers NIXL handshakes. vLLM reads it process-wide, so set it before vLLM starts."""
    return {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": config.side_channel_host or facts.host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(facts.side_channel_port),
    }
