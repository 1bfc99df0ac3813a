# SPDX-License-Identifier: Apache-2.0
"""The transports there are: from the settings to the descriptor. The one place that chooses."""

from __future__ import annotations

from typing import assert_never

from transport.config import MooncakeConfig, NixlConfig, TransportConfig
from transport.descriptor import Statistics, Transport
from transport.mooncake.descriptor import Mooncake
from transport.nixl.descriptor import Nixl
from transport.nixl_push.descriptor import NixlPush

STATISTICS: dict[str, Statistics] = {kind.connector: kind.statistics for kind in (Nixl, NixlPush, Mooncake)}
"""By vLLM's name for the connector class."""


def describe(config: TransportConfig) -> Transport:
    """Everything in which the chosen transport differs from the others."""
    match config:
        case NixlConfig():
            match config.mode:
                case "pull":
                    return Nixl(config)
                case "push":
                    return NixlPush(config)
                case _:
                    assert_never(config.mode)
        case MooncakeConfig():
            return Mooncake(config)
        case _:
            assert_never(config)
