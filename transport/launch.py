# SPDX-License-Identifier: Apache-2.0
"""From transport settings and the facts of one replica to vLLM's arguments and environment. Pure.

Nothing is bound, opened or exported here; whoever starts the engine does that with the result.
"""

from __future__ import annotations

from transport.config import TransportConfig
from transport.facts import EngineFacts, EngineLaunch
from transport.multi import multi
from transport.nixl import nixl_child, nixl_env

__all__ = ["EngineFacts", "EngineLaunch", "launch"]


def launch(config: TransportConfig, facts: EngineFacts) -> EngineLaunch:
    """What one engine needs to hand KV over (`prefill`) or to take it (`decode`)."""
    return EngineLaunch(
        env=nixl_env(config, facts),
        kv_transfer_config=multi([nixl_child(config, facts)], facts),
    )
