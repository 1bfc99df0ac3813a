# SPDX-License-Identifier: Apache-2.0
"""Which hand-offs a decode engine has admitted, so that it admits none twice, and which it will never admit.

A request can end in the HTTP server before the engine has it: while its prompt is rendered, or because it is refused.
The scheduler reports nothing of such a request. So the decode leg sends the hand-off's id in a header. If the engine
has not admitted the hand-off when the leg is over, `Admissions` reports it as `unread`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from cachetools import FIFOCache

from pools.engine.base import HANDOFF_HEADER, ASGIApp, KVTransferParams, Receive, Scope, Send
from pools.engine.events import EventLog
from pools.errors import HandoffRefusedError
from transport.handoff_params import DO_REMOTE_PREFILL, handoff_id_of

_MAX_REMEMBERED = 65_536
"""Hand-offs remembered, so that none is admitted twice; far more than can be within their leases at once."""
_HEADER = HANDOFF_HEADER.encode("latin-1")


@dataclass(frozen=True)
class ConsumedHandoff:
    """One hand-off, as its consumer sees it."""

    key: str
    """The KV's name in all engines, made of vLLM's own ids."""
    id: str
    """The id by which the prefill engine and the gateway know the hand-off."""


def consumed_by(params: KVTransferParams | None) -> ConsumedHandoff | None:
    """The hand-off that a request with these parameters reads, None for one that reads nothing."""
    if not isinstance(params, dict) or not params.get(DO_REMOTE_PREFILL):
        return None
    # Mooncake names a hand-off by `transfer_id` alone.
    name = params.get("remote_request_id") or params.get("transfer_id")
    return ConsumedHandoff(f"{params.get('remote_engine_id')}/{name}", handoff_id_of(params, name))


class Admissions:
    """The newest hand-offs that one engine has admitted, refused or given up. Used from one event loop."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._admitted: FIFOCache[str, bool] = FIFOCache(_MAX_REMEMBERED)
        self._ids: FIFOCache[str, bool] = FIFOCache(_MAX_REMEMBERED)
        self.num_admitted = 0

    def admit(self, handoff: ConsumedHandoff) -> None:
        """Let a request take this hand-off. Raises HandoffRefusedError if it was taken, refused or given up before."""
        if handoff.key in self._admitted:
            verb = "admitted" if self._admitted[handoff.key] else "refused"
            raise HandoffRefusedError(f"hand-off {handoff.key} was {verb} before; parameters are single-use")
        if not self._ids.get(handoff.id, True):
            # The prefill engine may have freed the blocks by now.
            raise HandoffRefusedError(f"hand-off {handoff.id} was given up before; parameters are single-use")
        self._admitted[handoff.key] = True
        self._ids[handoff.id] = True
        self.num_admitted += 1

    def forget(self, handoff: ConsumedHandoff) -> None:
        """Take an admission back: the engine refused the request."""
        if self._admitted.pop(handoff.key, False):
            self.num_admitted -= 1
            self._ids.pop(handoff.id, None)

    def refuse(self, handoff: ConsumedHandoff) -> None:
        """Never admit this hand-off from now on. Does nothing for one that was admitted."""
        if handoff.key not in self._admitted:
            self._admitted[handoff.key] = False

    def give_up(self, handoff_id: str) -> None:
        """Report, once, that this engine will not read this hand-off: event `unread`.

        Does nothing for a hand-off that was admitted: the scheduler reports on those.
        """
        if handoff_id not in self._ids:
            self._ids[handoff_id] = False
            self._events.append({"kind": "unread", "at": time.time(), "id": handoff_id})

    def watch(self, app: ASGIApp) -> ASGIApp:
        """Wrap `app`: at the end of a request, `give_up` is called for the hand-off that the request's header names."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            handoff_id = next((value for name, value in scope.get("headers", ()) if name == _HEADER), None)
            if handoff_id is None:
                await app(scope, receive, send)
                return
            try:
                await app(scope, receive, send)
            finally:
                self.give_up(handoff_id.decode("latin-1"))

        return watched
