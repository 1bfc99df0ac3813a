# SPDX-License-Identifier: Apache-2.0
"""The two legs of one request: prefill on one replica, the answer from another, and what happens when one is lost.

Deciding is in `legs` and `membership`; this is the shell that sends, waits and cleans up. Hand-off parameters are used
once: they go to one decode replica, and to its `release` when the request does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from disagg.config import GatewayConfig
from disagg.gateway.background import Background
from disagg.gateway.legs import (
    PATHS,
    Endpoint,
    Route,
    decode_body,
    prefill_body,
    probe_body,
    route_for,
    transfer_params,
)
from disagg.gateway.membership import Member, Membership, Pair
from disagg.gateway.metrics import Metrics
from disagg.gateway.wire import Exchange, Upstreams
from pools.errors import NoReplicaError, ReplicaLostError

logger = logging.getLogger(__name__)

_ERROR_EVENT = b'data: {"error"'
_CLEANUP_TIMEOUT_S = 10.0
_decode_json = msgspec.json.Decoder().decode


def _object(payload: bytes) -> dict[str, Any]:
    """An engine's JSON object; empty when it is none."""
    try:
        decoded = _decode_json(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return decoded if isinstance(decoded, dict) else {}


@dataclass(frozen=True)
class Call:
    """One request, parsed and rendered."""

    endpoint: Endpoint
    body: Mapping[str, Any]
    raw: bytes
    """The body as the client sent it; what goes out when nothing is handed off."""
    prompts: Sequence[Sequence[int]] | None
    """Token ids of each prompt, or None when it could not be rendered."""
    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers of the decode leg, e.g. trace context."""


@dataclass
class Answer:
    """The decode leg, ready to be sent on: its head is here, and its first bytes."""

    status: int
    content_type: str
    mode: str
    prefill_id: str
    decode_id: str
    content: bytes
    """The whole body, or the first chunk of a stream."""
    exchange: Exchange | None
    """The rest of a stream; None when `content` is everything."""
    _counted: contextlib.ExitStack

    def close(self) -> None:
        """End the decode leg, finished or not. Idempotent."""
        if self.exchange is not None:
            self.exchange.close()
        self._counted.close()


def is_server_fault(event: bytes) -> bool:
    """True for an SSE error event whose code is a 5xx: the engine's fault, so that another one may answer."""
    try:
        code = _decode_json(event.removeprefix(b"data: ").split(b"\n", 1)[0])["error"]["code"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return False
    return isinstance(code, int) and code >= 500


class Handoff:
    """Runs requests over the two pools. One per gateway replica."""

    def __init__(
        self,
        *,
        model_id: str,
        config: GatewayConfig,
        membership: Membership,
        upstreams: Upstreams,
        metrics: Metrics,
        background: Background,
    ) -> None:
        self._model_id = model_id
        self._config = config
        self._membership = membership
        self._upstreams = upstreams
        self._metrics = metrics
        self._background = background
        self._leg_ids = itertools.count(1)
        self._incarnation = uuid.uuid4().hex[:12]

    async def answer(self, call: Call) -> Answer:
        """Run the request up to the first bytes of its answer.

        Cancelling it stops both legs and gives unused KV back. Raises NoReplicaError when nobody can serve.
        """
        route = route_for(call.endpoint, call.body, call.prompts, min_handoff_tokens=self._config.min_handoff_tokens)
        if route.mode == "handoff":
            return await self._handed_off(call)
        if route.mode == "primed":
            return await self._primed(call, route)
        return await self._local(call, route.reason)

    # Modes

    async def _handed_off(self, call: Call) -> Answer:
        assert call.prompts is not None
        prefilled = await self._prefill(call, call.prompts[0])
        if isinstance(prefilled, str):
            return await self._local(call, prefilled)
        pair, params = prefilled
        body = decode_body(call.endpoint, call.body, call.prompts[0], params)
        try:
            answer = await self._decode(
                pair.decode, call, body, mode="handoff", prefill_id=pair.prefill.info.replica_id
            )
        except asyncio.CancelledError:
            self._metrics.disconnects.labels("decode").inc()
            self._background.spawn(self._release(pair.decode, params))
            raise
        except ReplicaLostError as exc:
            self._lost(pair.decode, exc)
            other = None if exc.sent else self._membership.pick_decode(without={pair.decode.info.replica_id})
            if other is not None:
                # Nobody has seen the parameters, so another decode engine can give them back.
                self._background.spawn(self._release(other, params))
            else:
                self._metrics.handoffs.labels("lost").inc()
            self._metrics.retries.labels("decode").inc()
            return await self._local(call, "decode_lost", without={pair.decode.info.replica_id})
        self._metrics.handoffs.labels("released" if 400 <= answer.status < 500 else "accepted").inc()
        if answer.status >= 500:
            answer.close()
            return await self._local(call, "decode_error")
        return answer

    async def _primed(self, call: Call, route: Route) -> Answer:
        """Pull each prompt's KV into the decode engine's prefix cache, then send the request as it is."""
        assert call.prompts is not None
        first = await self._prefill(call, call.prompts[0])
        if isinstance(first, str):
            return await self._local(call, first)
        pair, params = first
        async with asyncio.TaskGroup() as group:
            group.create_task(self._prime(pair, call.prompts[0], params))
            for ids in call.prompts[1:]:
                group.create_task(self._prefill_and_prime(pair, call, ids))
        try:
            return await self._decode(
                pair.decode, call, call.raw, mode="primed", prefill_id=pair.prefill.info.replica_id
            )
        except ReplicaLostError as exc:
            self._lost(pair.decode, exc)
            self._metrics.retries.labels("decode").inc()
            return await self._local(call, "decode_lost", without={pair.decode.info.replica_id})

    async def _local(self, call: Call, reason: str, without: set[str] | None = None) -> Answer:
        """The request as it came, on each decode replica in turn until one answers without a fault of its own."""
        tried = set(without or ())
        failed: Answer | None = None
        self._metrics.local_prefill(reason)
        while True:
            member = self._membership.pick_decode(without=tried)
            if member is None:
                if failed is not None:
                    return failed
                raise NoReplicaError("no decode replica is ready")
            try:
                answer = await self._decode(member, call, call.raw, mode="local", prefill_id="local")
            except ReplicaLostError as exc:
                self._lost(member, exc)
            else:
                if answer.status < 500:
                    return answer
                failed = answer
            self._metrics.retries.labels("decode").inc()
            tried.add(member.info.replica_id)

    # Legs

    async def _prefill(
        self, call: Call, prompt: Sequence[int], decode: Member | None = None
    ) -> tuple[Pair, dict[str, Any]] | str:
        """Hand-off parameters and the pair they belong to, for `decode` if given, or the reason why there are none."""
        tried: set[str] = set()
        deadline = asyncio.get_running_loop().time() + self._config.prefill_timeout_s
        while True:
            pair = self._membership.pick_pair(without=tried, decode=decode)
            if pair is None:
                return "prefill_lost" if tried else "no_warm_pair"
            leg_id = f"{self._incarnation}-{next(self._leg_ids)}"
            body = prefill_body(self._model_id, prompt, cache_salt=call.body.get("cache_salt"))
            with self._carried(pair.decode):
                leg = self._background.spawn(self._prefill_leg(pair.prefill, leg_id, body))
                try:
                    async with asyncio.timeout_at(deadline):
                        status, params = await asyncio.shield(leg)
                except asyncio.CancelledError:
                    self._metrics.disconnects.labels("prefill").inc()
                    self._background.spawn(self._abandon(pair, leg_id, leg))
                    raise
                except TimeoutError:
                    self._background.spawn(self._abandon(pair, leg_id, leg))
                    return "prefill_timeout"
                except ReplicaLostError as exc:
                    self._lost(pair.prefill, exc)
                    self._metrics.retries.labels("prefill").inc()
                    tried.add(pair.prefill.info.replica_id)
                    continue
            if params is not None:
                self._metrics.handoffs.labels("produced").inc()
                return pair, params
            if 400 <= status < 500:
                return "prefill_refused"
            if status < 400:
                return "prefill_offered_nothing"
            self._metrics.retries.labels("prefill").inc()
            tried.add(pair.prefill.info.replica_id)

    async def _prefill_leg(self, member: Member, leg_id: str, body: bytes) -> tuple[int, dict[str, Any] | None]:
        with self._carried(member), self._metrics.prefill_seconds.time():
            status, payload = await self._upstreams.get(member.info.url).request(
                "POST",
                PATHS["completions"],
                body,
                {"x-request-id": leg_id},
                timeout_s=self._config.prefill_timeout_s + _CLEANUP_TIMEOUT_S,
            )
        return status, transfer_params(_object(payload)) if status == 200 else None

    async def _prefill_and_prime(self, pair: Pair, call: Call, prompt: Sequence[int]) -> None:
        prefilled = await self._prefill(call, prompt, pair.decode)
        if not isinstance(prefilled, str):
            await self._prime(prefilled[0], prompt, prefilled[1])

    async def _prime(self, pair: Pair, prompt: Sequence[int], params: dict[str, Any]) -> None:
        """Make the decode engine pull one prompt's KV. A failure costs a recomputation and nothing else."""
        try:
            with self._carried(pair.decode):
                status, _ = await self._upstreams.get(pair.decode.info.url).request(
                    "POST", "/disagg/v1/probe", probe_body(prompt, params), timeout_s=self._config.prefill_timeout_s
                )
        except asyncio.CancelledError:
            self._background.spawn(self._release(pair.decode, params))
            raise
        except ReplicaLostError as exc:
            self._lost(pair.decode, exc)
            status = 503
        self._metrics.handoffs.labels("accepted" if status == 200 else "lost").inc()

    async def _decode(self, member: Member, call: Call, body: bytes, *, mode: str, prefill_id: str) -> Answer:
        """The decode leg up to its first bytes. Raises ReplicaLostError while nothing of it was shown to the client."""
        exchange: Exchange | None = None
        counted = contextlib.ExitStack()
        counted.enter_context(self._carried(member))
        try:
            exchange = await self._upstreams.get(member.info.url).open(
                "POST", PATHS[call.endpoint], body, {"x-request-id": call.request_id, **call.headers}
            )
            status = await exchange.head()
            # Not the body's `stream`: vLLM takes "yes" and 1 for true.
            streaming = status == 200 and (exchange.header(b"content-type") or b"").startswith(b"text/event-stream")
            content = (await exchange.next_chunk() or b"") if streaming else await exchange.read()
            if streaming and content.startswith(_ERROR_EVENT) and is_server_fault(content):
                raise ReplicaLostError(f"the engine at {member.info.url} failed before its first token", sent=True)
        except BaseException:
            if exchange is not None:
                exchange.close()
            counted.close()
            raise
        if exchange.complete:
            counted.close()
        content_type = exchange.header(b"content-type") or b"application/json"
        return Answer(
            status=status,
            content_type=content_type.decode("latin-1"),
            mode=mode,
            prefill_id=prefill_id,
            decode_id=member.info.replica_id,
            content=content,
            exchange=exchange if streaming else None,
            _counted=counted,
        )

    # Cleaning up

    async def _abandon(self, pair: Pair, leg_id: str, leg: asyncio.Task[tuple[int, dict[str, Any] | None]]) -> None:
        """Stop a prefill leg nobody waits for; if it has finished all the same, give its KV back."""
        late: dict[str, Any] | None = None
        with contextlib.suppress(ReplicaLostError):
            _, payload = await self._upstreams.get(pair.prefill.info.url).request(
                "POST",
                "/disagg/v1/abort",
                msgspec.json.encode({"request_id": leg_id}),
                timeout_s=_CLEANUP_TIMEOUT_S,
            )
            late = transfer_params(_object(payload))
        with contextlib.suppress(ReplicaLostError):
            _, params = await leg
            params = params or late
            if params is not None:
                self._metrics.handoffs.labels("produced").inc()
                await self._release(pair.decode, params)

    async def _release(self, member: Member, params: Mapping[str, Any]) -> None:
        """Give hand-off parameters back through a decode replica. If that fails, the lease ends them."""
        try:
            status, payload = await self._upstreams.get(member.info.url).request(
                "POST",
                "/disagg/v1/release",
                msgspec.json.encode({"kv_transfer_params": params}),
                timeout_s=_CLEANUP_TIMEOUT_S,
            )
        except ReplicaLostError as exc:
            logger.warning("KV of an unused hand-off stays until its lease ends: %s", exc)
            self._metrics.handoffs.labels("lost").inc()
            return
        # `released` is false when the engine had admitted the request before the client left; then it was consumed.
        released = status == 200 and _object(payload).get("released") is True
        self._metrics.handoffs.labels("released" if released else "accepted").inc()

    def _lost(self, member: Member, error: ReplicaLostError) -> None:
        logger.warning("replica %s lost: %s", member.info.replica_id, error)
        if not error.sent:
            self._membership.mark_unreachable(member)

    @contextlib.contextmanager
    def _carried(self, member: Member) -> Iterator[None]:
        member.num_in_flight += 1
        try:
            yield
        finally:
            member.num_in_flight -= 1
