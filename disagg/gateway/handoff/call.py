# SPDX-License-Identifier: Apache-2.0
"""One request on its way through the gateway: what was asked, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from disagg.gateway.front.fields import Endpoint
from disagg.gateway.handoff.cached import Reached
from pools.client.replica import Trace
from transport.handoff_params import Store

Phase = Literal["prefill", "decode", "stream"]
"""Where a request is when its client leaves."""


@dataclass
class Progress:
    """How far a request has come."""

    phase: Phase = "prefill"

    def at_decode(self) -> None:
        """Note that the decode leg begins. A stream that another replica resumes stays in the phase `stream`."""
        if self.phase == "prefill":
            self.phase = "decode"


@dataclass(frozen=True)
class Call:
    """One request, parsed and rendered."""

    endpoint: Endpoint
    body: Mapping[str, Any]
    raw: bytes
    """The client's body without the fields that only the gateway reads. Sent as it is in modes `local` and `primed`."""
    prompts: Sequence[Sequence[int]] | None
    """Token ids of each prompt, or None when it could not be rendered."""
    request_id: str
    trace: Trace = field(default_factory=dict)
    """Trace context of the client, for every leg."""
    store: Store | None = None
    """Whether the shared cache is to keep this prompt's KV; None when the client did not say."""
    tenant: str | None = None
    """Name of the tenant whose API key the client sent; None where clients need no key."""
    progress: Progress = field(default_factory=Progress, compare=False)
    """Shared by all calls that the gateway derives from this request."""
    reached: Reached = field(default_factory=Reached, compare=False)
    """Shared likewise."""
