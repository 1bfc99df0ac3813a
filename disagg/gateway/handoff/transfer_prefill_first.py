# SPDX-License-Identifier: Apache-2.0
"""One leg after the other: the prefill leg's answer says where the KV is, and goes into the decode leg."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from disagg.gateway.handoff.transfer import Attempt, PrefillFailed, T, refusal
from pools.errors import ReplicaLostError
from transport.descriptor import Transport


class PrefillFirst:
    """Keeps `transfer.Transfer`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def prefill_params(self, offer: Mapping[str, Any], handoff_id: str) -> dict[str, Any]:
        return {**offer, **self._transport.prefill_params(handoff_id)}

    async def run(self, attempt: Attempt[T], *, deadline: float) -> T:
        try:
            async with asyncio.timeout_at(deadline):
                reply = await asyncio.shield(attempt.send())
        except TimeoutError as exc:
            raise PrefillFailed("prefill_timeout", retry=True) from exc
        except ReplicaLostError as exc:
            raise PrefillFailed("prefill_lost", retry=True) from exc
        if reply.params is None:
            raise refusal(reply)
        return await attempt.take(self._transport.decode_params(attempt.handoff_id, reply.params))
