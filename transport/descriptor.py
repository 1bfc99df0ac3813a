# SPDX-License-Identifier: Apache-2.0
"""What a transport is: one object holds everything in which a transport differs from the others. Values only.

`transport.transports.describe` makes the object from the settings. Replicas, gateways, fake engines, statistics and
checks ask it; none of them decides by the transport's name what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from transport.facts import EngineFacts, Platform
from transport.kv_layouts import Layouts

Legs = Literal["prefill_first", "both_at_once"]
"""`prefill_first`: the prefill leg's answer says where the KV is, and the gateway puts it into the decode leg.
`both_at_once`: each engine waits for the other, and the gateway puts into the decode leg what the prefill replica has
published. The decode engine waits no longer than a lease, and then computes the prompt."""

Feature = Literal[
    "hedging",
    "prefill_pipeline",
    "prefill_pipeline_sliding_window",
    "prefill_pipeline_mamba",
    "decode_pipeline",
    "tensor_parallel",
]
"""`prefill_pipeline_*`: prefill engines in stages whose model has such layers."""


@dataclass(frozen=True)
class Limit:
    """What a transport cannot do, or has not been seen to do, in words for whoever configures it."""

    message: str
    refused: bool
    """True: such a config is an error. False: it is worth a warning."""


@dataclass(frozen=True)
class Listener:
    """Where an engine answers the engines of the other pool, and which question shows whether it answers."""

    protocol: Literal["nixl_handshake", "http_query"]
    host: str
    port: int

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Statistics:
    """How to read what vLLM reports for the transport's connector, as counters of `pools.engine.base.EngineStats`."""

    bytes: str
    """Counter that sums the list `bytes_transferred`."""
    cases: Mapping[str, tuple[str, ...]]
    """Counter -> vLLM's lists that have an entry for each case to count."""


class Transport(Protocol):
    """One transport with its settings. Pure."""

    @property
    def name(self) -> str:
        """Names the transport in messages. Engines whose transports have one name can hand KV over to each other."""
        ...

    @property
    def legs(self) -> Legs:
        """In which order a gateway sends the two legs."""
        ...

    @property
    def connector(self) -> str:
        """vLLM's name for the connector class, under which it reports statistics."""
        ...

    @property
    def statistics(self) -> Statistics: ...

    @property
    def module(self) -> str:
        """The Python module that it cannot do without."""
        ...

    @property
    def packages(self) -> Mapping[Platform, str]:
        """The package that brings `module`."""
        ...

    @property
    def limits(self) -> Mapping[Feature, Limit]:
        """A feature without an entry has no limit."""
        ...

    @property
    def layouts(self) -> Layouts:
        """What is known of models by how vLLM groups their KV. Each platform has every layout."""
        ...

    @property
    def kv_lease_duration_s(self) -> int:
        """Seconds a prefill engine keeps KV that nobody has asked for."""
        ...

    def child(self, facts: EngineFacts) -> dict[str, Any]:
        """The transport's entry among the children of MultiConnector, for one engine. JSON-able.

        The entry carries no `engine_id`: vLLM hands down the outer connector's id and refuses a second one.
        """
        ...

    def env(self, facts: EngineFacts) -> dict[str, str]:
        """Environment of that engine. vLLM reads it process-wide, so it is set before vLLM starts."""
        ...

    def listener(self, facts: EngineFacts) -> Listener | None:
        """Where that engine must answer others; None when nobody asks it anything."""
        ...

    def source(self, facts: EngineFacts) -> dict[str, Any]:
        """What that (prefill) engine publishes about where its KV is, for `decode_params`. JSON-able.

        Empty when only the answer of each prefill leg says where the KV is.
        """
        ...

    def prefill_params(self, handoff_id: str) -> dict[str, Any]:
        """What goes into `kv_transfer_params` of a prefill leg beside what all transports send."""
        ...

    def decode_params(self, handoff_id: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """`kv_transfer_params` of a decode leg.

        Args:
            found: with `prefill_first` the parameters in the prefill leg's answer, else the replica's `source`.
        """
        ...
