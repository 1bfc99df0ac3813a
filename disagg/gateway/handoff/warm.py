# SPDX-License-Identifier: Apache-2.0
"""Moves KV once between every new pair of replicas, so that no request pays for the first handshake.

The transfer says how the KV moves. A pair is warm when the decode engine reports the block of a fresh prompt as cached,
although only the prefill engine has computed that block.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from typing import Any

from disagg.gateway.background import Background
from disagg.gateway.backoff import Backoff
from disagg.gateway.handoff.transfer import PrefillFailed, PrefillLeg, Transfer
from disagg.gateway.replicas.choosing import Seat
from disagg.gateway.replicas.kv_paths import KvPaths
from disagg.gateway.replicas.membership import Member, Membership, Pair
from disagg.observability.metrics import Metrics
from pools.client.messages import PrefillReply, Probed, offered
from pools.client.replica import NO_TRACE
from pools.errors import ReplicaLostError, UnusableAnswerError
from transport.handoff_params import offer_params, warm_up_id

logger = logging.getLogger(__name__)

_TIMEOUT_S = 60.0
_MAX_AT_ONCE = 4
"""vLLM handshakes one peer at a time, so larger waves only queue there."""
_FIRST_RETRY_S = 0.5
_MAX_RETRY_S = 10.0


class PairWarmer:
    """Warms cold pairs in the background, for as long as both replicas live."""

    def __init__(
        self,
        membership: Membership,
        metrics: Metrics,
        background: Background,
        transfer: Transfer,
        paths: KvPaths,
    ) -> None:
        self._membership = membership
        self._paths = paths
        self._transfer = transfer
        self._metrics = metrics
        self._background = background
        self._in_progress: set[tuple[str, str]] = set()
        self._slots = asyncio.Semaphore(_MAX_AT_ONCE)
        self._random = random.Random(uuid.uuid4().int)
        self._misfits: set[tuple[str, str]] = set()

    def start_missing(self) -> None:
        """Begin to warm every cold pair that is not being warmed already. Returns at once."""
        self._tell_misfits()
        self._paths.retain(self._membership.incarnations())
        for pair in self._membership.cold_pairs():
            key = (pair.prefill.info.incarnation, pair.decode.info.incarnation)
            if key not in self._in_progress:
                self._in_progress.add(key)
                self._background.forever(self._warm(pair, key))

    def _tell_misfits(self) -> None:
        """Log each pair once between whose replicas no KV can go."""
        found = {
            (pair.prefill.info.incarnation, pair.decode.info.incarnation): (pair, why)
            for pair, why in self._membership.misfits()
        }
        for pair, why in (found[key] for key in found.keys() - self._misfits):
            logger.warning(
                "no KV goes from %s to %s, which have %s; as during a rolling update",
                pair.prefill.info.replica_id,
                pair.decode.info.replica_id,
                why,
            )
        self._misfits = set(found)

    async def _warm(self, pair: Pair, key: tuple[str, str]) -> None:
        backoff = Backoff(_FIRST_RETRY_S, _MAX_RETRY_S)
        try:
            while self._is_cold(pair):
                async with self._slots:
                    failure = await self._try(pair)
                if failure is None:
                    self._metrics.warm_attempts.labels("ok").inc()
                    self._paths.warmed(pair.key)
                    self._membership.mark_warm(pair)
                    return
                self._metrics.warm_attempts.labels("failed").inc()
                self._paths.not_warmed(pair.key)
                delay_s = backoff.next_s()
                logger.warning(
                    "no KV moved yet from %s to %s: %s; trying again in %.1f s",
                    pair.prefill.info.replica_id,
                    pair.decode.info.replica_id,
                    failure,
                    delay_s,
                )
                await asyncio.sleep(delay_s)
        finally:
            self._in_progress.discard(key)

    def _is_cold(self, pair: Pair) -> bool:
        return any(c.prefill is pair.prefill and c.decode is pair.decode for c in self._membership.cold_pairs())

    async def _try(self, pair: Pair) -> str | None:
        """One fresh block through the pair; None when it arrived, else what went wrong."""
        info = pair.prefill.info
        prompt = [self._random.randrange(info.vocab_size) for _ in range(info.block_size + 1)]
        # The id is not one of a request, so that no ledger counts it. `never`: no tier keeps the random tokens.
        warm_id = warm_up_id(uuid.uuid4().hex)
        deadline = asyncio.get_running_loop().time() + _TIMEOUT_S
        try:
            offer = self._transfer.prefill_params(offer_params(warm_id, "never"), warm_id, pair.prefill)
            task = self._background.spawn_kept(_offered(pair.prefill, prompt, offer))
            leg = PrefillLeg(warm_id, pair.prefill, task)
            params = await self._transfer.params(leg, deadline=deadline)
            probing = _probed(pair.decode, prompt, params)
            probed = await self._transfer.finish(leg, probing, drop=_nothing, deadline=deadline)
        except PrefillFailed as exc:
            return f"{exc.reason} ({exc.__cause__ or 'the prefill probe answered without KV'})"
        except (ReplicaLostError, UnusableAnswerError) as exc:
            return str(exc)
        cached = probed.num_cached_tokens
        return None if cached >= info.block_size else f"only {cached} of {len(prompt)} tokens arrived"


async def _offered(prefill: Member, prompt: list[int], params: dict[str, Any]) -> PrefillReply:
    """What a prefill engine offers for a probe."""
    try:
        probed = await _probed(prefill, prompt, params)
    except UnusableAnswerError as exc:
        logger.warning("a prefill probe came to nothing: %s", exc)
        return PrefillReply(exc.status)
    return PrefillReply(200, offered(probed.kv_transfer_params), probed.finish_reason == "length")


async def _probed(member: Member, prompt: list[int], params: dict[str, Any]) -> Probed:
    with Seat(member):
        return await member.client.probe(prompt, params, trace=NO_TRACE, timeout_s=_TIMEOUT_S)


def _nothing(_: Probed) -> None:
    """Drop an answered probe: it holds nothing that has to be ended."""
