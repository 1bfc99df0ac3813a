# SPDX-License-Identifier: Apache-2.0
"""Chooses the class that runs a transport's hand-offs, by the transport's `legs`."""

from __future__ import annotations

from typing import assert_never

from disagg.gateway.handoff.transfer import Transfer
from disagg.gateway.handoff.transfer_both_at_once import BothAtOnce
from disagg.gateway.handoff.transfer_prefill_first import PrefillFirst
from transport.descriptor import Transport


def transfer_for(transport: Transport) -> Transfer:
    """The `Transfer` for the hand-offs of one transport."""
    match transport.legs:
        case "prefill_first":
            return PrefillFirst(transport)
        case "both_at_once":
            return BothAtOnce(transport)
        case _:
            assert_never(transport.legs)
