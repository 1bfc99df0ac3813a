# SPDX-License-Identifier: Apache-2.0
"""What our MultiConnector asks of its children beyond vLLM's connector interface. No vLLM imports.

A child that lacks one of these methods is not asked, so vLLM's own connectors work as children too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Literal, Protocol, runtime_checkable

Outcome = Literal["consumed", "released", "expired"]
"""How a hold ended: read by a decode engine, settled by the gateway, or out of lease."""
Ended = dict[str, tuple[Outcome, float | None]]
"""vLLM's request id -> outcome, and the seconds of lease that were left (None when unknown or not applicable)."""
Event = dict[str, Any]
"""One JSON-able engine event; `pools.engine.events` lists the kinds."""


@runtime_checkable
class TransferWorker(Protocol):
    """Worker side of the child that moves KV between the pools. One instance a rank."""

    def settle(self, req_ids: set[str]) -> None:
        """Forget the leases of the requests that are still held.

        They come out of the next `get_transfer_results` as `finished_sending`. Ids that are not held are ignored.
        """
        ...

    def take_ended(self) -> Ended:
        """What ended on this rank since the last call."""
        ...


@runtime_checkable
class TransferScheduler(Protocol):
    """Scheduler side of the same child."""

    def take_unread(self) -> list[str]:
        """Ids of hand-offs whose request ended here before its KV was read, since the last call."""
        ...


@runtime_checkable
class EarlySettler(Protocol):
    """Scheduler side of a transfer child whose reader may be waiting for KV that is not there yet."""

    def settle_handoffs(self, handoff_ids: Collection[str]) -> None:
        """Nobody will consume these hand-offs. They are not held, or not yet. A reader that waits for one is told."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Scheduler side of a shared tier's child, when this child stores KV that nobody consumed."""

    def hold(self, request: Any, handoff_id: str, store: str | None) -> None:
        """Note a finished request whose KV the transfer child keeps. Called before the sink's own `request_finished`.

        `store` is what the client said: "never", "always" or None.
        """
        ...

    def decide(self, req_id: str, outcome: Outcome) -> bool:
        """The hold of `req_id` is over; the scheduler frees its blocks after this call. True: the sink keeps them."""
        ...

    def take_events_of_sink(self) -> Iterable[Event]:
        """`rescued`, `rescue_failed`, `tier_degraded` and `tier_recovered` events since the last call."""
        ...


@runtime_checkable
class Skippable(Protocol):
    """A child that must know of a request even when another child has its KV."""

    def skip(self, request: Any) -> None:
        """Make the per-request state without looking anything up."""
        ...


@runtime_checkable
class Chunked(Protocol):
    """A child that stores KV in chunks, each under a name made of its tokens."""

    chunk_tokens: int

    def token_ids(self, request: Any) -> list[int]:
        """The tokens that name the request's chunks. Where a prompt has images they differ from the prompt's tokens."""
        ...
