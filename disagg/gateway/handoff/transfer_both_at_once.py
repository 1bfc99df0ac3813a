# SPDX-License-Identifier: Apache-2.0
"""Both legs at once, matched by the hand-off's id: each engine waits for the other.

The first token takes as long as the slower leg. The decode engine waits for KV that may never come, so `finish` watches
the prefill leg until the decode leg has its first bytes. The decode engine waits no longer than a lease. Then it
computes the prompt itself, and may answer while the prefill leg still runs; the caller has to stop that leg.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from disagg.gateway.handoff.transfer import PrefillFailed, PrefillLeg, T, refusal
from disagg.gateway.replicas.membership import Member
from pools.client.messages import PrefillReply
from pools.errors import ReplicaLostError
from transport.descriptor import Transport


class BothAtOnce:
    """Implements `transfer.Transfer`."""

    tells_cached = False

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def prefill_params(self, offer: Mapping[str, Any], handoff_id: str, prefill: Member) -> dict[str, Any]:
        if not prefill.info.kv_source:
            raise PrefillFailed("prefill_lost", retry=True)
        return {**offer, **self._transport.prefill_params(handoff_id)}

    async def params(self, leg: PrefillLeg, *, deadline: float) -> dict[str, Any]:
        return self._transport.decode_params(leg.handoff_id, leg.prefill.info.kv_source)

    async def finish(
        self, leg: PrefillLeg, decode: Coroutine[Any, Any, T], *, drop: Callable[[T], None], deadline: float
    ) -> T:
        taking = asyncio.ensure_future(decode)
        try:
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait({leg.task, taking}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                _check(leg.task)
                await asyncio.wait({taking})
        except BaseException:
            await _ended(taking, drop)
            raise
        return taking.result()


def _check(leg: asyncio.Task[PrefillReply]) -> None:
    """Raises PrefillFailed unless the leg ended well."""
    if not leg.done():
        raise PrefillFailed("prefill_timeout", retry=True) from TimeoutError()
    error = leg.exception()
    if isinstance(error, ReplicaLostError):
        raise PrefillFailed("prefill_lost", retry=True) from error
    if error is not None:
        raise error
    reply = leg.result()
    if not reply.complete:
        raise refusal(reply)


async def _ended(taking: asyncio.Task[T], drop: Callable[[T], None]) -> None:
    """End the decode leg, also one whose first bytes came at the last moment."""
    taking.cancel()
    await asyncio.wait({taking})
    if not taking.cancelled() and taking.exception() is None:
        drop(taking.result())
