# SPDX-License-Identifier: Apache-2.0
"""Mooncake's settings as launch arguments, and how a dead peer is told from a slow one."""

from __future__ import annotations

import asyncio
import json

import pytest
from pydantic import TypeAdapter, ValidationError

from transport.config import MooncakeConfig, TransportConfig
from transport.in_engine.mooncake.peers import Peers
from transport.launch import EngineFacts, EngineLaunch, launch


def planned(role: str, **settings: object) -> EngineLaunch:
    facts = EngineFacts(
        role=role,  # type: ignore[arg-type]
        platform="cuda",
        host="10.0.0.5",
        listener_port=8123,
        engine_id="p-1",
    )
    return launch(MooncakeConfig(type="mooncake", **settings), facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_child(role: str, kv_role: str) -> None:
    """The child is our class under vLLM's name, in the engine's own role, and carries no second engine id."""
    config = planned(role, protocol="rdma", device_name="mlx5_0,mlx5_1", num_workers=8).kv_transfer_config
    bootstrap = {"bootstrap_server_address": "10.0.0.5:8123"} if role == "prefill" else {}
    assert config["kv_connector_extra_config"]["connectors"] == [
        {
            "kv_connector": "MooncakeConnector",
            "kv_connector_module_path": "transport.in_engine.mooncake.connector",
            "kv_role": kv_role,
            "kv_buffer_device": "cuda",
            "kv_connector_extra_config": {
                "mooncake_protocol": "rdma",
                "device_name": "mlx5_0,mlx5_1",
                "num_workers": 8,
                **bootstrap,
            },
        }
    ]
    assert config["kv_load_failure_policy"] == "recompute"
    assert json.loads(json.dumps(config)) == config


def test_env() -> None:
    """Both roles get address and limits."""
    common = {
        "VLLM_HOST_IP": "10.0.0.5",
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "45",
        "VLLM_MOONCAKE_CONNECTOR_TIMEOUT": "7",
    }
    settings = {"kv_lease_duration_s": 45, "connector_timeout_s": 7}
    assert planned("decode", **settings).env == planned("prefill", **settings).env == common


def test_rdma_needs_a_device() -> None:
    """The error of a missing device says which field to set."""
    with pytest.raises(ValidationError, match="device") as caught:
        TypeAdapter(TransportConfig).validate_python({"type": "mooncake", "protocol": "rdma"})
    (error,) = caught.value.errors()
    assert "device_name" in (*error["loc"], error.get("ctx", {}).get("field"))


ADDRESS = "tcp://10.0.0.5:4711"


class Port:
    """One port of a host that always answers."""

    def __init__(self) -> None:
        self.open = True
        self.num_looks = 0

    async def refuses(self, host: str, port: int) -> bool:
        assert (host, port) == ("10.0.0.5", 4711)
        self.num_looks += 1
        await asyncio.sleep(0)
        return not self.open

    async def looked_at(self, times: int) -> None:
        while self.num_looks < times:
            await asyncio.sleep(0)


async def test_a_listening_peer_is_not_gone() -> None:
    """While somebody listens, or refuses only once, nobody is told anything."""
    port = Port()
    waiting = asyncio.create_task(Peers(0, port.refuses).gone(ADDRESS))
    await port.looked_at(3)
    port.open = False
    await port.looked_at(4)
    port.open = True
    await port.looked_at(10)
    assert not waiting.done()
    waiting.cancel()


async def test_all_who_wait_hear_that_a_peer_is_gone() -> None:
    """When the port closes, everyone who waits for it returns, and those who ask later do too. One look serves all."""
    port = Port()
    peers = Peers(0, port.refuses)
    waiting = [asyncio.create_task(peers.gone(ADDRESS)) for _ in range(5)]
    await port.looked_at(2)
    port.open, before = False, port.num_looks
    await asyncio.wait_for(asyncio.gather(*waiting), 2)
    assert port.num_looks <= before + 3
    await asyncio.wait_for(peers.gone(ADDRESS), 2)


async def test_one_who_stops_waiting_leaves_the_others_alone() -> None:
    """A cancelled wait does not end the others, and the last one leaves no task behind."""
    port = Port()
    peers = Peers(0, port.refuses)
    first, second = (asyncio.create_task(peers.gone(ADDRESS)) for _ in range(2))
    await port.looked_at(1)
    first.cancel()
    await port.looked_at(4)
    assert first.cancelled() and not second.done()
    port.open = False
    await asyncio.wait_for(second, 2)
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1
