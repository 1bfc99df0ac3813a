# SPDX-License-Identifier: Apache-2.0
"""The contract of an engine: what a replica, the gateway and the tests may ask of it.

`VllmEngine` and `FakeEngine` both keep it, and `pools.testing.check_engine` proves that of either. The
OpenAI routes are the engine's own ASGI app; the methods here are what those routes cannot say.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

Role = Literal["prefill", "decode"]
KVTransferParams = dict[str, Any]
"""One hand-off's `kv_transfer_params`, in vLLM's own keys. Single-use."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class ProbeResult:
    """What one token through the engine showed."""

    num_cached_tokens: int
    """Prompt tokens that were not computed by this engine for this request: prefix cache or KV transfer."""
    kv_transfer_params: KVTransferParams | None
    """Hand-off parameters, when the probe asked for a remote decode."""
    finish_reason: str | None


@dataclass(frozen=True)
class Aborted:
    """What became of an abort."""

    found: bool
    """Whether the request was running."""
    kv_transfer_params: KVTransferParams | None = None
    """Hand-off parameters of a request that finished in the engine while it was being aborted. Its own answer does not
    carry them any more, so whoever aborted has to release them."""


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
    """Bytes this engine pulled over NIXL; 0 on a prefill engine."""
    nixl_num_failed_transfers_total: int
    num_kv_expired_reqs_total: int
    """Hand-offs whose lease ran out on this (prefill) engine."""
    num_handoffs_admitted_total: int
    """Hand-off parameters that reached this (decode) engine's scheduler."""
    num_handoffs_released_total: int
    """Hand-off parameters given back unused through `release`."""

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
        """Token ids are below it, valid after `start`."""
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

    async def abort(self, request_id: str) -> Aborted:
        """Stop the request that carried this `X-Request-Id`. Idempotent."""
        ...

    async def release(self, kv_transfer_params: KVTransferParams) -> bool:
        """Give hand-off parameters back unused, so that the prefill engine frees its blocks at once.

        False when they were admitted or released before. After a release the same parameters are refused.
        """
        ...

    async def probe(
        self, prompt_token_ids: Sequence[int], kv_transfer_params: KVTransferParams | None = None
    ) -> ProbeResult:
        """Run one token through the engine itself. Raises EngineDeadError when it is gone."""
        ...

    def stats(self) -> EngineStats:
        """Latest snapshot. Does not block."""
        ...

    async def shutdown(self) -> None:
        """Stop the engine and every process it started. Idempotent."""
        ...
