# SPDX-License-Identifier: Apache-2.0
"""MultiConnector, the outer connector of every engine. Pure; receives built children, imports none of them.

An engine with a single child has it too, so that another tier adds an entry to a list and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transport.facts import EngineFacts


def multi(children: Sequence[dict[str, Any]], facts: EngineFacts) -> dict[str, Any]:
    """The `kv_transfer_config` of one engine around `children`: the transfer child first, then the tiers. JSON-able.

    The class is ours, under vLLM's name. vLLM reads `kv_load_failure_policy` from here alone, never from a child. With
    `recompute` it computes KV that does not arrive.

    Source:
        vLLM 0.32 `multi_connector.py`, `config/kv_transfer.py`, `v1/core/sched/scheduler.py`.
    """
    return {
        "kv_connector": "MultiConnector",
        "kv_connector_module_path": "transport.in_engine.outer.connector",
        "kv_role": "kv_both",
        "engine_id": facts.engine_id,
        "kv_buffer_device": facts.platform,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [dict(child) for child in children]},
    }
