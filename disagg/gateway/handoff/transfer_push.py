# SPDX-License-Identifier: Apache-2.0
"""The prefill engine pushes (Mooncake): both legs at once, matched by a transfer id that the gateway chooses.

The first token takes as long as the slower leg. Decode waits for KV that may never come, so the prefill leg is watched
until decode has shown something. It waits no longer than a lease: then it computes the prompt itself and answers beside
a prefill leg that still runs, which is the caller's to stop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from disagg.gateway.handoff.legs import HANDOFF_ID, REMOTE_PREFILL, PrefillReply, json_object
from disagg.gateway.handoff.transfer import Attempt, PrefillFailed, T, refusal
from disagg.gateway.replicas.membership import Member
from pools.client.http1 import Upstreams
from pools.errors import ReplicaLostError

logger = logging.getLogger(__name__)

_QUERY_TIMEOUT_S = 5.0


class Push:
    """Both legs at once."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    def prefill_params(self, offer: Mapping[str, Any], handoff_id: str) -> dict[str, Any]:
        return {**offer, "transfer_id": handoff_id}

    async def run(self, attempt: Attempt[T], *, deadline: float) -> T:
        prefill = attempt.prefill
        # Known since the pair was warmed; only after a failure is it asked for here.
        engine_id = prefill.remote_engine_id or await self._look_up(prefill)
        params = {
            **REMOTE_PREFILL,
            "remote_engine_id": engine_id,
            "remote_bootstrap_addr": prefill.info.bootstrap_url,
            "transfer_id": attempt.handoff_id,
            HANDOFF_ID: attempt.handoff_id,
        }
        leg = attempt.send()
        taking: asyncio.Task[T] = asyncio.ensure_future(attempt.take(params))
        try:
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait({leg, taking}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                _check(leg)
                await asyncio.wait({taking})
        except BaseException as exc:
            if isinstance(exc, PrefillFailed):
                # Perhaps it is another engine than the one that was asked; the next hand-off asks again.
                prefill.remote_engine_id = None
            await _ended(taking, attempt)
            raise
        return taking.result()

    async def _look_up(self, prefill: Member) -> str:
        """The engine id under which Mooncake's bootstrap server knows this replica's KV memory.

        Source: vLLM 0.32 `MooncakeBootstrapServer`, `GET /query`: data-parallel rank to engine. A replica has one rank.
        """
        url = prefill.info.bootstrap_url
        if url is None:
            raise PrefillFailed("prefill_lost", retry=True)
        try:
            status, payload = await self._upstreams.get(url).request("GET", "/query", timeout_s=_QUERY_TIMEOUT_S)
        except ReplicaLostError as exc:
            raise PrefillFailed("prefill_lost", retry=True) from exc
        entry = json_object(payload).get("0") if status == 200 else None
        engine_id = entry.get("engine_id") if isinstance(entry, dict) else None
        if not isinstance(engine_id, str):
            logger.warning("%s/query does not name an engine: %s %r", url, status, payload[:200])
            raise PrefillFailed("prefill_lost", retry=True)
        prefill.remote_engine_id = engine_id
        return engine_id


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


async def _ended(taking: asyncio.Task[T], attempt: Attempt[T]) -> None:
    """End the decode leg, also one whose first bytes came at the last moment."""
    taking.cancel()
    await asyncio.wait({taking})
    if not taking.cancelled() and taking.exception() is None:
        attempt.drop(taking.result())
