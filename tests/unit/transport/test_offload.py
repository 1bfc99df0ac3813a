# SPDX-License-Identifier: Apache-2.0
"""What the settings of the host-memory tier become."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from transport.facts import EngineFacts
from transport.offload import GIB, offload_child
from transport.tiers import OffloadConfig

DISK = {"path": "/kv", "n_read_threads": 2, "n_write_threads": 3}


def extra(platform: str = "cuda", role: str = "prefill", **settings: Any) -> dict[str, Any]:
    facts = EngineFacts(role=role, platform=platform, host="10.0.0.5", listener_port=4711, engine_id="p-1")  # type: ignore[arg-type]
    child = offload_child(OffloadConfig.model_validate({"cpu_gib": 2, **settings}), facts)
    assert json.loads(json.dumps(child)) == child
    assert {key: child[key] for key in child if key != "kv_connector_extra_config"} == {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
    }
    config: dict[str, Any] = child["kv_connector_extra_config"]
    return config


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_either_role_stores_and_loads(role: str) -> None:
    """The entry is the same on both pools, and says no more than what was set."""
    assert extra(role=role) == {"spec_name": "CPUOffloadingSpec", "cpu_bytes_to_use": 2 * GIB, "eviction_policy": "lru"}


@pytest.mark.parametrize(
    ("platform", "disk", "name"),
    [
        ("cuda", None, "CPUOffloadingSpec"),
        ("cuda", DISK, "TieringOffloadingSpec"),
        ("cpu", None, "HostOffloadingSpec"),
        ("cpu", DISK, "HostTieringOffloadingSpec"),
    ],
)
def test_spec(platform: str, disk: dict[str, Any] | None, name: str) -> None:
    """vLLM's own specs where there is an accelerator, this project's where there is none."""
    config = extra(platform, disk=disk)
    assert config["spec_name"] == name
    assert config.get("spec_module_path") == ("transport.in_engine.host_offload.specs" if platform == "cpu" else None)


def test_size_is_the_total_in_bytes() -> None:
    """vLLM divides the bytes among the ranks itself, so the entry holds the total, as a whole number."""
    assert extra(cpu_gib=0.3)["cpu_bytes_to_use"] == 322122547


def test_every_setting_arrives() -> None:
    """Policy, threshold and piece size go under vLLM's names."""
    assert extra(eviction_policy="arc", store_threshold=2, block_tokens=256) == {
        "spec_name": "CPUOffloadingSpec",
        "cpu_bytes_to_use": 2 * GIB,
        "eviction_policy": "arc",
        "store_threshold": 2,
        "block_size": 256,
    }


def test_disk_is_a_secondary_tier_of_files() -> None:
    """The disk becomes vLLM's `fs` tier."""
    assert extra(disk=DISK)["secondary_tiers"] == [
        {"type": "fs", "root_dir": "/kv", "n_read_threads": 2, "n_write_threads": 3}
    ]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"store_threshold": 2, "disk": DISK}, "store_threshold"),
        ({"cpu_gib": 0}, "cpu_gib"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"eviction_policy": "fifo"}, "eviction_policy"),
        ({"disk": {"path": ""}}, "disk.path"),
    ],
)
def test_what_vllm_would_refuse_later(settings: dict[str, Any], word: str) -> None:
    """Settings that cannot work are refused with the model, not when the engine starts."""
    with pytest.raises(ValidationError) as caught:
        OffloadConfig.model_validate({"cpu_gib": 2, **settings})
    (error,) = caught.value.errors()
    assert word in (".".join(map(str, error["loc"])), error.get("ctx", {}).get("field"))
