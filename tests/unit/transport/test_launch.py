# SPDX-License-Identifier: Apache-2.0
"""What transport settings and the facts of a replica become."""

from __future__ import annotations

import json

import pytest

from transport.config import NixlConfig
from transport.launch import EngineFacts, EngineLaunch, launch


def planned(role: str, platform: str = "cpu", **settings: object) -> EngineLaunch:
    facts = EngineFacts(role=role, platform=platform, host="10.0.0.5", listener_port=4711, engine_id="p-1")  # type: ignore[arg-type]
    return launch(NixlConfig(**settings), facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_kv_transfer_config(role: str, kv_role: str, platform: str) -> None:
    """Either role gets an outer MultiConnector that recomputes, with NIXL inside in its own role."""
    assert planned(role, platform, kv_lease_duration_s=60).kv_transfer_config == {
        "kv_connector": "MultiConnector",
        "kv_connector_module_path": "transport.in_engine.outer.connector",
        "kv_role": "kv_both",
        "engine_id": "p-1",
        "kv_buffer_device": platform,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "connectors": [
                {
                    "kv_connector": "NixlConnector",
                    "kv_connector_module_path": "transport.in_engine.nixl.connector",
                    "kv_role": kv_role,
                    "kv_buffer_device": platform,
                    "kv_connector_extra_config": {"backends": ["UCX"], "kv_lease_duration": 60},
                }
            ]
        },
    }


def test_both_roles_get_the_same_lease() -> None:
    """A decode engine derives its heartbeat from its own copy of the lease, so the copies agree."""
    leases = {
        child["kv_connector_extra_config"]["kv_lease_duration"]
        for role in ("prefill", "decode")
        for child in planned(role).kv_transfer_config["kv_connector_extra_config"]["connectors"]
    }
    assert leases == {30}


def test_children_carry_no_engine_id() -> None:
    """vLLM hands the outer id to each child and raises on a second one."""
    (child,) = planned("decode").kv_transfer_config["kv_connector_extra_config"]["connectors"]
    assert "engine_id" not in child


def test_config_is_json_able() -> None:
    """The config crosses processes as JSON, so it survives a round trip."""
    config = planned("prefill", backends=("UCX", "GDS")).kv_transfer_config
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize(("setting", "host"), [(None, "10.0.0.5"), ("192.168.1.9", "192.168.1.9")])
def test_side_channel(setting: str | None, host: str) -> None:
    """The handshake address is the node's unless a setting names another; the port is the replica's. The layout is the
    one in which vLLM hands states over."""
    assert planned("prefill", side_channel_host=setting).env == {
        "VLLM_SSM_CONV_STATE_LAYOUT": "DS",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "4711",
    }
