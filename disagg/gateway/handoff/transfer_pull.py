# SPDX-License-Identifier: Apache-2.0
"""The decode engine pulls (NIXL): prefill first, whose answer says where the KV is, then decode."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from disagg.gateway.handoff.legs import HANDOFF_ID
from disagg.gateway.handoff.transfer import Attempt, PrefillFailed, T, refusal
from pools.errors import ReplicaLostError


class Pull:
    """One leg after the other."""

    def prefill_params(self, offer: Mapping[str, Any], handoff_id: str) -> dict[str, Any]:
        return dict(offer)

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
        return await attempt.take({**reply.params, HANDOFF_ID: attempt.handoff_id})
