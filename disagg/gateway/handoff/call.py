# SPDX-License-Identifier: Apache-2.0
"""One request on its way through the gateway: what was asked, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from disagg.gateway.front.fields import Endpoint
from pools.client.replica import Trace
from transport.handoff_params import Store

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
    trace: Trace = field(default_factory=dict)
    """Trace context of the client, for every leg."""
    store: Store | None = None
    """What the client said about KV that nobody consumes."""
    tenant: str | None = None
    """Whose API key it came with; None where clients need none."""
    progress: Progress = field(default_factory=Progress, compare=False)
    """Shared by all that is made of this request."""
