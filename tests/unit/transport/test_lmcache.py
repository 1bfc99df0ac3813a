# SPDX-License-Identifier: Apache-2.0
"""What the settings of the shared tier become for one engine."""

from __future__ import annotations

import dataclasses
import json

import pytest

from transport.facts import EngineFacts
from transport.lmcache import lmcache_child, lmcache_env
from transport.tiers import ExternalServerConfig, ManagedServerConfig, SharedCacheConfig


def facts(role: str = "prefill", url: str | None = "tcp://10.0.0.5:7001") -> EngineFacts:
    return EngineFacts(
        role=role,  # type: ignore[arg-type]
        platform="cpu",
        host="10.0.0.5",
        listener_port=4711,
        engine_id="p-1",
        lmcache_url=url,
    )


@pytest.mark.parametrize(
    ("role", "sink", "kv_role", "lazy"),
    [
        ("prefill", "unused", "kv_both", True),
        ("prefill", "evicted", "kv_both", True),
        ("prefill", "write_through", "kv_both", True),
        ("prefill", "off", "kv_consumer", None),
        ("decode", "unused", "kv_consumer", None),
        ("decode", "write_through", "kv_consumer", None),
    ],
)
def test_roles(role: str, sink: str, kv_role: str, lazy: bool | None) -> None:
    """Only prefill engines with a sink can store; decode engines load and nothing else."""
    child = lmcache_child(SharedCacheConfig(sink=sink), facts(role))  # type: ignore[arg-type]
    extra = child["kv_connector_extra_config"]
    assert child["kv_role"] == kv_role
    assert extra.get("lmcache.mp.lazy_offload") is lazy
    assert extra["disagg.sink"] == (sink if role == "prefill" else "off")


def test_child() -> None:
    """LMCache's class name, our module, its own keys, no engine id."""
    config = SharedCacheConfig(mq_timeout_s=9, heartbeat_interval_s=2)
    child = lmcache_child(config, facts())
    assert child == {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "transport.in_engine.lmcache.connector",
        "kv_role": "kv_both",
        "kv_buffer_device": "cpu",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://10.0.0.5",
            "lmcache.mp.port": 7001,
            "lmcache.mp.mq_timeout": 9.0,
            "lmcache.mp.heartbeat_interval": 2.0,
            "lmcache.mp.mp_transfer_mode": "auto",
            "lmcache.mp.lazy_offload": True,
            "disagg.sink": "unused",
            "disagg.operation_timeout": 9.0,
        },
    }
    assert json.loads(json.dumps(child)) == child


def test_an_accelerators_server_gets_more_time() -> None:
    """It copies by itself, so blocks must not be given away while it may still do so."""
    config = SharedCacheConfig(mq_timeout_s=9)
    child = lmcache_child(config, dataclasses.replace(facts(), platform="cuda"))
    extra = child["kv_connector_extra_config"]
    assert (extra["lmcache.mp.mq_timeout"], extra["disagg.operation_timeout"]) == (9.0, 90.0)


@pytest.mark.parametrize(
    ("server", "port"),
    [
        (ManagedServerConfig(port=5555), 5555),
        (ManagedServerConfig(), 0),
        (ExternalServerConfig(type="external", url="tcp://10.0.0.5:6000"), 6000),
    ],
)
def test_before_a_server_runs_the_settings_name_it(
    server: ManagedServerConfig | ExternalServerConfig, port: int
) -> None:
    """A resolved config shows the address that is known so far."""
    extra = lmcache_child(SharedCacheConfig(server=server), facts(url=None))["kv_connector_extra_config"]
    assert (extra["lmcache.mp.host"], extra["lmcache.mp.port"]) == ("tcp://10.0.0.5", port)


def test_environment_has_no_telemetry() -> None:
    """LMCache reports its use over the internet unless told not to."""
    assert lmcache_env(SharedCacheConfig()) == {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
