# SPDX-License-Identifier: Apache-2.0
"""The contract of an engine: what a replica, the gateway and the tests may ask of it.

`VllmEngine` and `FakeEngine` both keep it, and `pools.testing.contract.check_engine` proves that of either. The
OpenAI routes are the engine's own ASGI app; the methods here are what those routes cannot say.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from pools.engine.events import EventLog

Role = Literal["prefill", "decode"]
KVTransferParams = dict[str, Any]
"""One hand-off's `kv_transfer_params`, in vLLM's own keys. Single-use."""

HANDOFF_HEADER = "x-disagg-handoff-id"
"""In this header a decode leg sends the id of the hand-off that its `kv_transfer_params` name. With it the engine can
report the hand-off as `unread` when the leg ends before the engine has the request."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class ProbeResult:
    """What one token through the engine showed."""

    num_cached_tokens: int
    """Prompt tokens that this engine did not compute for this request: from its prefix cache or by KV transfer."""
    kv_transfer_params: KVTransferParams | None
    """Hand-off parameters, when the probe asked for a remote decode."""
    finish_reason: str | None
    num_cached_before: int = 0
    """Those of the cached tokens that no KV transfer has brought."""


@dataclass(frozen=True)
class EngineStats:
    """One snapshot of an engine. Counters (`*_total`) start at 0 with the incarnation."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float
    """Share of KV blocks in use, 0 to 1; cached blocks that nobody holds count as free."""
    prompt_tokens_total: int
    """Prompt tokens this engine received, cached or computed."""
    prompt_tokens_computed_total: int
    """Prompt tokens this engine computed itself."""
    generation_tokens_total: int
    nixl_bytes_transferred_total: int
    """Bytes this engine moved over NIXL: a decode engine in pull mode, a prefill engine in push mode. `nixl_*` and
    `mooncake_*` are 0 with the other connector."""
    nixl_num_failed_transfers_total: int
    num_kv_expired_reqs_total: int
    """Hand-offs whose lease ran out on this (prefill) engine."""
    num_handoffs_admitted_total: int
    """Hand-off parameters that reached this (decode) engine's scheduler."""
    num_preemptions_total: int = 0
    prompt_tokens_p2p_total: int = 0
    """Prompt tokens whose KV came over the transport. This one and the next three are vLLM's
    `prompt_tokens_cached_by_source`."""
    prompt_tokens_host_total: int = 0
    """Prompt tokens loaded from host memory."""
    prompt_tokens_disk_total: int = 0
    """Prompt tokens loaded from the disk tier below host memory."""
    prompt_tokens_external_total: int = 0
    """Prompt tokens loaded from a tier that vLLM cannot name: LMCache."""
    nixl_num_failed_notifications_total: int = 0
    """Reads whose end could not be reported to the prefill engine, which then holds the KV until the lease runs out."""
    num_notifications_after_expiry_total: int = 0
    """Reads that ended after this (prefill) engine had given the KV up. Its blocks may have been overwritten before the
    read ended. In push mode: writes that ended after this (decode) engine had given the blocks away."""
    kv_offload_load_bytes_total: int = 0
    """Bytes moved from host memory into this engine's KV space."""
    kv_offload_store_bytes_total: int = 0
    """Bytes moved from this engine's KV space into host memory."""
    kv_offload_allocation_failures_total: int = 0
    """Times that host memory had no room for what was to be moved there."""
    mooncake_bytes_transferred_total: int = 0
    """Bytes this (prefill) engine wrote into decode engines over Mooncake."""
    mooncake_num_failed_transfers_total: int = 0
    """Writes that failed on this (prefill) engine, or hand-offs whose KV did not come to this (decode) engine."""
    num_steps_total: int = 0
    """Steps that the engine has reported, also those that finished nothing; 0 for an engine that reports no steps."""
    num_requests_kv_fetch_waiting_to_start: int = 0
    """Requests on this (decode) engine whose KV is elsewhere and whose fetch has not begun. A gauge."""

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


class Engine(Protocol):
    """One inference engine, owned by one replica and used from one event loop."""

    @property
    def engine_id(self) -> str:
        """Identity of this engine's KV memory. New with every start, also at the same address."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens in one KV block, valid after `start`."""
        ...

    @property
    def vocab_size(self) -> int:
        """Every token id is below this number. Valid after `start`."""
        ...

    @property
    def app(self) -> ASGIApp:
        """The engine's OpenAI app, valid after `start`."""
        ...

    @property
    def dead(self) -> BaseException | None:
        """Why the engine can serve nothing any more, or None while it lives. Does not block."""
        ...

    async def start(self) -> None:
        """Return when the engine answers requests. Raises EngineStartError when it cannot."""
        ...

    async def abort(self, request_id: str) -> bool:
        """Stop the request that carried this `X-Request-Id`. Returns whether it was running. Idempotent.

        A prefill leg may have ended in the engine a moment before, and the engine then holds its KV. So whoever aborts
        a prefill leg settles its hand-off, too.
        """
        ...

    async def settle(self, handoff_ids: Sequence[str]) -> None:
        """End this (prefill) engine's hold of the KV of these hand-offs, because nobody will consume them.

        Returns when the engine has taken the ids; `events` says when each hold is over. Ids of unknown or ended
        hand-offs do no harm. The engine remembers the id of a hand-off that is not produced yet, within bounds, and
        ends the hold when the hand-off is produced.
        """
        ...

    async def probe(
        self,
        prompt_token_ids: Sequence[int],
        kv_transfer_params: KVTransferParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        session_id: str | None = None,
    ) -> ProbeResult:
        """Run one token through the engine itself. Raises EngineDeadError when the engine is gone.

        The probe uses and fills the caches of `cache_salt`, and queues by `priority`, as a request with these does.
        """
        ...

    async def reset_prefix_cache(self) -> bool:
        """Forget every prompt in the engine's own KV memory; tiers below it keep theirs.

        Returns False and forgets nothing while blocks are in use. Raises EngineDeadError.
        """
        ...

    def stats(self) -> EngineStats:
        """Latest snapshot. Does not block."""
        ...

    @property
    def events(self) -> EventLog:
        """What happened to the KV of hand-offs here; the same object for the engine's life."""
        ...

    async def shutdown(self) -> None:
        """Stop the engine and every process it started. Idempotent."""
        ...
