# SPDX-License-Identifier: Apache-2.0
"""What the gateway counts, for Prometheus. `docs/metrics.md` is generated from here.

Labels have few values by construction: pools, modes, fixed reasons, status codes; never ids of requests. What engines
count themselves is in `disagg.gateway.engine_metrics`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from disagg.gateway.engine_metrics import EngineCollector
from disagg.gateway.ledger import ENDS, TOTALS

logger = logging.getLogger(__name__)

AMOUNTS = ("produced", "consumed", "orphaned", "rescued", "stored", "reused")
"""Outcomes that tokens and bytes are counted by."""
TIERS = ("offload", "disk", "lmcache", "sink")
"""Tiers whose failures are told apart."""
_ORPHANED = frozenset(ENDS) - {"consumed"}
_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class Metrics:
    """One gateway replica's metrics, in a registry of their own."""

    def __init__(self) -> None:
        # The time a series was made says nothing here and doubles their number.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "disagg_requests",
            "Requests answered, by how the prompt got its KV (handoff, primed, local, none) and status code.",
            ["endpoint", "mode", "code"],
            registry=registry,
        )
        self.local_prefills = Counter(
            "disagg_local_prefills",
            "Requests whose prompt the decode engine computed itself, by reason.",
            ["reason"],
            registry=registry,
        )
        self.handoffs = Counter(
            "disagg_handoffs",
            "Hand-offs, as the engines tell: produced on prefill, then one of consumed, released, rescued, expired and "
            "failed. Beside these, stored in the shared cache and reused from there.",
            ["outcome"],
            registry=registry,
        )
        self.handoff_tokens = Counter(
            "disagg_handoff_tokens",
            "Prompt tokens of these hand-offs. orphaned is all that was not consumed, rescued its part that the shared "
            "cache keeps; stored and reused count full chunks.",
            ["outcome"],
            registry=registry,
        )
        self.handoff_bytes = Counter(
            "disagg_handoff_bytes",
            "Bytes of their KV, over all layers and ranks, with the same outcomes.",
            ["outcome"],
            registry=registry,
        )
        self.lease_left_seconds = Histogram(
            "disagg_handoff_lease_left_seconds",
            "What was left of the lease when a decode engine had read the KV.",
            buckets=(0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 15.0, 20.0, 25.0, 30.0, 60.0, 120.0, 300.0),
            registry=registry,
        )
        self.open_handoffs = Gauge(
            "disagg_open_handoffs", "Hand-offs produced by a prefill engine and not ended.", registry=registry
        )
        self.ledger_events_lost = Counter(
            "disagg_ledger_events_lost",
            "Engine events that were overwritten before this gateway had read them.",
            registry=registry,
        )
        self.ledger_feed_errors = Counter(
            "disagg_ledger_feed_errors",
            "Failed attempts to read engine events from a replica; they are tried again.",
            registry=registry,
        )
        self.stores = Counter(
            "disagg_stores",
            "Requests that said whether the shared cache may store their KV, by what they said.",
            ["store"],
            registry=registry,
        )
        self.tier_degraded = Counter(
            "disagg_tier_degraded",
            "Times that a tier stopped working in some engine, which then went on without it. Each gateway replica "
            "counts those of all engines since its own start: take the maximum over gateways, not the sum.",
            ["tier"],
            registry=registry,
        )
        self.retries = Counter(
            "disagg_leg_retries",
            "Legs that were sent to another replica because the first one was lost.",
            ["leg"],
            registry=registry,
        )
        self.disconnects = Counter(
            "disagg_client_disconnects",
            "Clients that left before their answer was complete, by phase (prefill, decode, stream).",
            ["phase"],
            registry=registry,
        )
        self.broken_streams = Counter(
            "disagg_broken_streams",
            "Streams that ended with an error event because the decode replica was lost after the first token.",
            registry=registry,
        )
        self.streams = Counter(
            "disagg_streams",
            "Streamed answers by the path their bytes took: splice (socket to socket) or asgi.",
            ["path"],
            registry=registry,
        )
        self.warm_attempts = Counter(
            "disagg_pair_warm_attempts",
            "Attempts to move KV between a new pair of replicas before it is used.",
            ["outcome"],
            registry=registry,
        )
        self.prefill_seconds = Histogram(
            "disagg_prefill_leg_seconds",
            "Time from sending the prefill leg to its hand-off parameters.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_byte_seconds = Histogram(
            "disagg_time_to_first_byte_seconds",
            "Time from the request's last byte to the first byte of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.render_seconds = Histogram(
            "disagg_render_seconds",
            "Time to apply the chat template and tokenise, queueing included.",
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0),
            registry=registry,
        )
        self.in_flight = Gauge(
            "disagg_requests_in_flight", "Requests that this gateway carries at the moment.", registry=registry
        )
        self.replicas = Gauge(
            "disagg_replicas", "Replicas this gateway knows, by pool and state.", ["pool", "state"], registry=registry
        )
        self.warm_pairs = Gauge(
            "disagg_warm_pairs", "Pairs of a prefill and a decode replica that have moved KV.", registry=registry
        )
        self.engines = EngineCollector()
        registry.register(self.engines)
        self._handoffs = {word: self.handoffs.labels(word) for word in TOTALS}
        self._tokens = {word: self.handoff_tokens.labels(word) for word in AMOUNTS}
        self._bytes = {word: self.handoff_bytes.labels(word) for word in AMOUNTS}
        self._before_render: list[Callable[[], None]] = []
        self._said: set[str] = set()

    def on_render(self, refresh: Callable[[], None]) -> None:
        """Call `refresh` before each exposition, to set gauges."""
        self._before_render.append(refresh)

    def render(self) -> bytes:
        """Prometheus text format, version 0.0.4."""
        for refresh in self._before_render:
            refresh()
        return generate_latest(self.registry)

    def count_handoff(self, word: str, tokens: int, num_bytes: int) -> None:
        """Take over an addition to the ledger's books."""
        self._handoffs[word].inc()
        if word in self._tokens:
            self._tokens[word].inc(tokens)
            self._bytes[word].inc(num_bytes)
        if word in _ORPHANED:
            self._tokens["orphaned"].inc(tokens)
            self._bytes["orphaned"].inc(num_bytes)

    def count_degraded(self, tier: object) -> None:
        """Count a tier that stopped working in an engine."""
        self.tier_degraded.labels(tier if tier in TIERS else "other").inc()

    def local_prefill(self, reason: str) -> None:
        """Count a prompt that was not handed off, and say each reason once in the log."""
        self.local_prefills.labels(reason).inc()
        if reason not in self._said:
            self._said.add(reason)
            logger.warning(
                "a prompt is prefilled on the decode engine (reason: %s); later ones are only counted in "
                "disagg_local_prefills_total",
                reason,
            )
