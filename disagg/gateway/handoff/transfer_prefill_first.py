# SPDX-License-Identifier: Apache-2.0
"""One leg after the other: the prefill leg's answer says where the KV is, and goes into the decode leg."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from disagg.gateway.handoff.transfer import PrefillFailed, PrefillLeg, T, refusal
from disagg.gateway.replicas.membership import Member
from pools.errors import ReplicaLostError
from transport.descriptor import Transport


class PrefillFirst:
    """Implements `transfer.Transfer`."""

    tells_cached = True

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def prefill_params(self, offer: Mapping[str, Any], handoff_id: str, prefill: Member) -> dict[str, Any]:
        return {**offer, **self._transport.prefill_params(handoff_id)}

    async def params(self, leg: PrefillLeg, *, deadline: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout_at(deadline):
                reply = await asyncio.shield(leg.task)
        except TimeoutError as exc:
            raise PrefillFailed("prefill_timeout", retry=True) from exc
        except ReplicaLostError as exc:
            raise PrefillFailed("prefill_lost", retry=True) from exc
        if reply.params is None:
            raise refusal(reply)
        return self._transport.decode_params(leg.handoff_id, reply.params)

    async def finish(
        self, leg: PrefillLeg, decode: Coroutine[Any, Any, T], *, drop: Callable[[T], None], deadline: float
    ) -> T:
        return await decode
