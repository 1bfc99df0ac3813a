# SPDX-License-Identifier: Apache-2.0
"""Sends single legs to engines and counts them there. Knows nothing of hand-offs, retries or cleaning up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from disagg.gateway.front.fields import PATHS, Endpoint
from disagg.gateway.handoff.legs import PrefillReply, is_server_fault, prefill_reply, probe_body
from disagg.gateway.handoff.settling import UnderWay
from disagg.gateway.replicas.membership import Member, Membership
from disagg.gateway.replicas.reservation import Hold
from disagg.observability.metrics import Metrics
from pools.client.http1 import Exchange, Upstreams
from pools.engine.base import HANDOFF_HEADER
from pools.errors import ReplicaLostError
from transport.handoff_params import Store

logger = logging.getLogger(__name__)

_ERROR_EVENT = b'data: {"error"'


Phase = Literal["prefill", "decode", "stream"]
"""Where a request is when its client leaves."""


@dataclass
class Progress:
    """How far a request has come."""

    phase: Phase = "prefill"

    def at_decode(self) -> None:
        """The decode leg begins. A stream that goes on elsewhere stays one."""
        if self.phase == "prefill":
            self.phase = "decode"


@dataclass(frozen=True)
class Call:
    """One request, parsed and rendered."""

    endpoint: Endpoint
    body: Mapping[str, Any]
    raw: bytes
    """The body as the client sent it, less what only the gateway reads; goes out when nothing is handed off."""
    prompts: Sequence[Sequence[int]] | None
    """Token ids of each prompt, or None when it could not be rendered."""
    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers of the decode leg, e.g. trace context."""
    store: Store | None = None
    """What the client said about KV that nobody consumes."""
    tenant: str | None = None
    """Whose API key it came with; None where clients need none."""
    progress: Progress = field(default_factory=Progress, compare=False)
    """Shared by all that is made of this request."""


@dataclass
class Answer:
    """The decode leg, ready to be sent on: its head is here, and its first bytes."""

    status: int
    content_type: str
    mode: str
    prefill_id: str
    decode_id: str
    decode_fit: str
    """Its `kv_fit`."""
    content: bytes
    """The whole body, or the first chunk of a stream."""
    exchange: Exchange | None
    """The rest of a stream; None when `content` is everything."""
    _hold: Hold
    under_way: UnderWay | None = None
    """The hand-off that it is made of, if the prompt's KV came by one."""

    def close(self) -> None:
        """End the decode leg, finished or not. Idempotent."""
        if self.exchange is not None:
            self.exchange.close()
        self._hold.release()


def _nothing() -> None:
    pass


class Sender:
    """Single legs over HTTP."""

    def __init__(self, membership: Membership, upstreams: Upstreams, metrics: Metrics) -> None:
        self._membership = membership
        self._upstreams = upstreams
        self._metrics = metrics

    async def prefill(self, hold: Hold, leg_id: str, body: bytes, *, timeout_s: float) -> PrefillReply:
        """The prefill leg, which takes `hold` over. Raises ReplicaLostError."""
        with hold, self._metrics.prefill_seconds.time():
            status, payload = await self._upstreams.get(hold.member.info.url).request(
                "POST", PATHS["completions"], body, {"x-request-id": leg_id}, timeout_s=timeout_s
            )
        return prefill_reply(status, payload)

    async def probe(
        self,
        hold: Hold,
        prompt: Sequence[int],
        params: Mapping[str, Any],
        *,
        timeout_s: float,
        on_sent: Callable[[], None] = _nothing,
        cache_salt: str | None = None,
    ) -> tuple[int, bytes]:
        """One token through an engine, for the KV's sake, which takes `hold` over. Raises ReplicaLostError."""
        body = probe_body(prompt, params, cache_salt)
        with hold:
            return await self._upstreams.get(hold.member.info.url).request(
                "POST", "/disagg/v1/probe", body, timeout_s=timeout_s, on_sent=on_sent
            )

    async def decode(
        self,
        hold: Hold,
        call: Call,
        body: bytes,
        *,
        mode: str,
        prefill_id: str,
        handoff_id: str | None = None,
        on_sent: Callable[[], None] = _nothing,
    ) -> Answer:
        """The decode leg up to its first bytes. Raises ReplicaLostError while nothing of it was shown to the client.

        Args:
            hold: taken over by the answer, which releases it at its end.
            handoff_id: the hand-off that `body` brings; the engine tells it as `unread` if it never takes it.
        """
        member = hold.member
        headers = {"x-request-id": call.request_id, **call.headers}
        if handoff_id is not None:
            headers[HANDOFF_HEADER] = handoff_id
        exchange: Exchange | None = None
        try:
            exchange = await self._upstreams.get(member.info.url).open("POST", PATHS[call.endpoint], body, headers)
            on_sent()
            status = await exchange.head()
            # Not the body's `stream`: vLLM takes "yes" and 1 for true.
            streaming = status == 200 and (exchange.header(b"content-type") or b"").startswith(b"text/event-stream")
            content = (await exchange.next_chunk() or b"") if streaming else await exchange.read()
            if streaming and content.startswith(_ERROR_EVENT) and is_server_fault(content):
                raise ReplicaLostError(
                    f"the engine at {member.info.url} failed before its first token", sent=True, gone=True
                )
        except BaseException:
            if exchange is not None:
                exchange.close()
            hold.release()
            raise
        if exchange.complete:
            hold.release()
        content_type = exchange.header(b"content-type") or b"application/json"
        return Answer(
            status=status,
            content_type=content_type.decode("latin-1"),
            mode=mode,
            prefill_id=prefill_id,
            decode_id=member.info.replica_id,
            decode_fit=member.info.kv_fit,
            content=content,
            exchange=exchange if streaming else None,
            _hold=hold,
        )

    def lost(self, member: Member, error: ReplicaLostError) -> None:
        """Stop choosing a replica that could not be connected to."""
        logger.warning("replica %s lost: %s", member.info.replica_id, error)
        if error.unreachable:
            self._membership.mark_unreachable(member)


def spawn_kept(task: asyncio.Task[Any]) -> None:
    """Let a task fail unseen: whoever needs its outcome has it already."""
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
