# SPDX-License-Identifier: Apache-2.0
"""OffloadingConnector, the host-memory tier, as a child of MultiConnector. Pure."""

from __future__ import annotations

from typing import Any

from transport.facts import EngineFacts
from transport.kv_layouts import MLA_ON_CPU, NO_ENCODER_DECODER, Layouts, on_both
from transport.tiers import OffloadConfig

GIB = 1024**3

_HOST_SPECS = "transport.in_engine.host_offload.specs"
"""vLLM's own specs copy with an accelerator's copy engine. The specs of this module copy on a machine without one."""

_SPEC_NAMES = {
    ("cuda", False): "CPUOffloadingSpec",
    ("cuda", True): "TieringOffloadingSpec",
    ("cpu", False): "HostOffloadingSpec",
    ("cpu", True): "HostTieringOffloadingSpec",
}
"""By platform, and whether there is a disk."""

OFFLOAD_LAYOUTS: Layouts = on_both(
    cpu={"mla_attention": MLA_ON_CPU, "cross_attention": NO_ENCODER_DECODER},
    cuda={"cross_attention": NO_ENCODER_DECODER},
)
"""With and without a disk."""


def offload_child(config: OffloadConfig, facts: EngineFacts) -> dict[str, Any]:
    """The OffloadingConnector entry for one engine, JSON-able.

    `kv_both` in both roles: an engine of either pool stores what its own memory loses, and loads it again.

    Source:
        vLLM 0.32 `offloading/config.py`, `v1/kv_offload/cpu/spec.py`, `v1/kv_offload/tiering/spec.py`: keys of
        `kv_connector_extra_config`.
    """
    extra: dict[str, Any] = {
        "spec_name": _SPEC_NAMES[facts.platform, config.disk is not None],
        "cpu_bytes_to_use": int(config.cpu_gib * GIB),
        "eviction_policy": config.eviction_policy,
    }
    if facts.platform == "cpu":
        extra["spec_module_path"] = _HOST_SPECS
    if config.block_tokens is not None:
        extra["block_size"] = config.block_tokens
    if config.disk is not None:
        disk = config.disk
        extra["secondary_tiers"] = [
            {
                "type": "fs",
                "root_dir": disk.path,
                "n_read_threads": disk.n_read_threads,
                "n_write_threads": disk.n_write_threads,
            }
        ]
    elif config.store_threshold > 1:
        extra["store_threshold"] = config.store_threshold
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
