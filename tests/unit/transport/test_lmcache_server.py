# SPDX-License-Identifier: Apache-2.0
"""Command line, environment and refusals of an `lmcache server`, from settings alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from transport.lmcache_server import (
    REAP_TIMEOUT_S,
    REGISTRATION_GRACE_S,
    l2_adapter,
    new_shm_name,
    server_argv,
    server_env,
    server_problems,
    shm_stem,
)
from transport.tiers import ManagedServerConfig

MOONCAKE = {
    "type": "mooncake_store",
    "master_server_address": "10.0.0.9:50051",
    "metadata_server": "P2PHANDSHAKE",
    "protocol": "rdma",
    "device_name": "mlx5_0",
}


def _config(**settings: Any) -> ManagedServerConfig:
    return ManagedServerConfig.model_validate(settings)


def _argv(config: ManagedServerConfig, platform: str = "cpu") -> list[str]:
    return server_argv(config, platform=platform, host="10.0.0.1", port=7001, http_port=7002, shm_name="segment")


def _value(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def _has(*missing: str) -> Callable[[str], bool]:
    return lambda name: name not in missing


def test_the_http_api_is_for_the_node_alone() -> None:
    """The queue is bound to the private address. The HTTP API, which prints the environment with its secrets to whoever
    asks, is bound to loopback."""
    argv = _argv(_config())
    assert [_value(argv, option) for option in ("--host", "--port", "--http-host", "--http-port")] == [
        "10.0.0.1",
        "7001",
        "127.0.0.1",
        "7002",
    ]


def test_settings_reach_the_server_under_its_own_names() -> None:
    """Sizes, chunk, policy and threads are what the config says."""
    argv = _argv(_config(l1_gib=0.5, chunk_tokens=128, eviction_policy="ARC", max_workers=3))
    options = ("--l1-size-gb", "--chunk-size", "--eviction-policy", "--max-workers", "--supported-transfer-mode")
    assert [_value(argv, option) for option in options] == ["0.5", "128", "ARC", "3", "auto"]


def test_a_policy_that_never_evicts_from_memory_is_refused() -> None:
    """IsolatedLRU's eviction thread ends when L1 is full for the first time, so it cannot be chosen."""
    with pytest.raises(ValidationError, match="eviction_policy"):
        _config(eviction_policy="IsolatedLRU")


def test_shared_memory_is_for_engines_without_an_accelerator() -> None:
    """On cpu L1 is one named segment; on cuda it is pinned memory that grows from a small start."""
    cpu, cuda = _argv(_config()), _argv(_config(), platform="cuda")
    assert _value(cpu, "--shm-name") == "segment" and "--no-l1-use-lazy" in cpu
    assert "--shm-name" not in cuda and _value(cuda, "--l1-init-size-gb") == "1"


def test_an_idle_engine_is_kept() -> None:
    """Silence before the first heartbeat is granted for years, and LMCache's own rule on the two values holds."""
    argv = _argv(_config())
    assert _value(argv, "--worker-registration-grace-seconds") == str(REGISTRATION_GRACE_S)
    assert REGISTRATION_GRACE_S > 300_000_000 > REAP_TIMEOUT_S >= 30


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "fs", "path": "/data/kv"}, {"type": "fs", "base_path": "/data/kv"}),
        ({"type": "resp", "host": "cache"}, {"type": "resp", "host": "cache", "port": 6379}),
        (
            {"type": "resp", "host": "cache", "port": 6380, "username": "kv", "password_env": "SECRET"},
            {"type": "resp", "host": "cache", "port": 6380, "username": "kv"},
        ),
        (
            {"type": "s3", "endpoint": "s3://kv.s3.example.com", "region": "eu-west-1", "tls": False},
            {
                "type": "s3",
                "s3_endpoint": "s3://kv.s3.example.com",
                "s3_region": "eu-west-1",
                "disable_tls": True,
            },
        ),
        (
            MOONCAKE | {"segment_gib": 2},
            {
                "type": "mooncake_store",
                "local_hostname": "10.0.0.1",
                "metadata_server": "P2PHANDSHAKE",
                "master_server_addr": "10.0.0.9:50051",
                "protocol": "rdma",
                "global_segment_size": "2147483648",
                "rdma_devices": "mlx5_0",
            },
        ),
    ],
    ids=["fs", "resp", "resp with a password", "s3", "mooncake_store"],
)
def test_l2_settings_become_the_adapters_keys(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    """Each storage has the keys of its adapter, and no secret."""
    config = _config(l2=[settings])
    assert l2_adapter(config.l2[0], host="10.0.0.1") == expected
    assert json.loads(_value(_argv(config), "--l2-adapter")) == expected


def test_l2_is_asked_in_the_order_of_the_config() -> None:
    """The option is repeated once for each storage."""
    argv = _argv(_config(l2=[{"type": "resp", "host": "cache"}, {"type": "fs", "path": "/data/kv"}]))
    found = [json.loads(argv[i + 1])["type"] for i, option in enumerate(argv) if option == "--l2-adapter"]
    assert found == ["resp", "fs"]


def test_a_password_goes_through_the_environment_only() -> None:
    """It is in the server's environment and in no argument, which every user of the machine can read."""
    config = _config(l2=[{"type": "resp", "host": "cache", "password_env": "SECRET"}])
    assert server_env(config, {"SECRET": "hunter2"})["LMCACHE_RESP_PASSWORD"] == "hunter2"
    assert "hunter2" not in " ".join(_argv(config)) and "LMCACHE_RESP_PASSWORD" not in server_env(_config(), {})


@pytest.mark.parametrize(
    ("settings", "missing", "path"),
    [
        ({}, "lmcache", "type"),
        ({"l2": [{"type": "s3", "endpoint": "b.example.com", "region": "x"}]}, "boto3", "l2[0].type"),
        ({"l2": [{"type": "fs", "path": "/kv"}, MOONCAKE]}, "lmcache.lmcache_mooncake", "l2[1].type"),
        ({"l2": [{"type": "resp", "host": "c", "password_env": "UNSET"}]}, "", "l2[0].password_env"),
        (
            {"l2": [{"type": "resp", "host": "c", "password_env": "SET"}, {"type": "resp", "host": "d"}]},
            "",
            "l2[0].password_env",
        ),
    ],
    ids=["no package", "no boto3", "no mooncake", "no password", "two passwords"],
)
def test_settings_that_cannot_work_are_refused_by_their_path(settings: Any, missing: str, path: str) -> None:
    """Every refusal names the field below `server`; with everything there is none."""
    problems = server_problems(_config(**settings), {"SET": "x"}, _has(missing))
    assert [found for found, _ in problems] == [path]


def test_good_settings_have_no_problems() -> None:
    """All storages together are fine where everything is installed."""
    l2 = [{"type": "fs", "path": "/kv"}, {"type": "resp", "host": "c", "password_env": "SET"}, MOONCAKE]
    assert server_problems(_config(l2=l2), {"SET": "x"}, _has()) == []


def test_an_s3_endpoint_with_a_path_is_refused() -> None:
    """LMCache signs for the host alone; `https://` or a path would fail at the first store, with no error to see."""
    for endpoint in ("https://bucket.s3.example.com", "s3://s3.example.com/bucket"):
        with pytest.raises(ValidationError):
            _config(l2=[{"type": "s3", "endpoint": endpoint, "region": "x"}])


def test_segments_of_two_starts_differ_and_are_found_by_port() -> None:
    """A successor never has its predecessor's segment, and clearing one port leaves the others alone."""
    first, second = new_shm_name(7001, "a"), new_shm_name(7001, "b")
    assert first != second and first.startswith(shm_stem(7001)) and second.startswith(shm_stem(7001))
    assert not new_shm_name(70011, "a").startswith(shm_stem(7001))
