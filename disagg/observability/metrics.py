# SPDX-License-Identifier: Apache-2.0
"""What the gateway counts, for Prometheus. `docs/metrics.md` is generated from here.

Labels have few values by construction: pools, modes, fixed reasons, status codes; never ids of requests. What engines
count themselves is in `disagg.observability.engine_metrics`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from disagg.observability.engine_metrics import EngineCollector
from disagg.observability.outcomes import ENDS, TOTALS

logger = logging.getLogger(__name__)

AMOUNTS = ("produced", "consumed", "orphaned", "rescued", "stored", "reused")
"""Outcomes that tokens and bytes are counted by."""
QUARANTINES = ("hang", "probe_failed", "listener", "unanswered")
"""Why a replica is taken out of routing."""
TIERS = ("offload", "disk", "lmcache", "sink")
"""Tiers whose failures are told apart."""
_ORPHANED = frozenset(ENDS) - {"consumed"}
_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class Metrics:
    """One gateway replica's metrics, in a registry of their own."""

    def __init__(self) -> None:
        # The `_created` series, which hold the time a series was made, say nothing here and double their number.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "disagg_requests",
            "Requests answered, by how the prompt got its KV (handoff, primed, local, prefill, none) and status code.",
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
        self.foreign_handoffs = Counter(
            "disagg_foreign_handoffs",
            "Hand-offs of other gateway replicas, as the engines tell, with the same outcomes. Each gateway replica "
            "counts those of all others: a gateway that died is still counted here.",
            ["outcome"],
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
            "Legs that were sent to another replica because the first one was lost or too slow.",
            ["leg"],
            registry=registry,
        )
        self.hedges = Counter(
            "disagg_hedges",
            "Prefill legs that were sent to a second replica because the first was slow, by whether it was faster.",
            ["outcome"],
            registry=registry,
        )
        self.local_prefill_tokens = Gauge(
            "disagg_local_prefill_tokens",
            "Prompt tokens that a decode replica computes for this gateway at the moment, without a hand-off.",
            ["replica"],
            registry=registry,
        )
        self.local_prefills_refused = Counter(
            "disagg_local_prefills_refused",
            "Requests answered 429 because no decode replica had room for their prompt (gateway.local_prefill_tokens).",
            registry=registry,
        )
        self.breaker_opened = Counter(
            "disagg_pair_breaker_opened",
            "Pairs taken out of routing because hand-offs between them failed while both replicas worked.",
            registry=registry,
        )
        self.loop_pause_seconds = Histogram(
            "disagg_loop_pause_seconds",
            "By how much the gateway's event loop was late, looked at twenty times a second. No stream of this gateway "
            "goes on meanwhile.",
            buckets=(0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
            registry=registry,
        )
        self.loop_longest_pause_seconds = Gauge(
            "disagg_loop_longest_pause_seconds",
            "The longest of these since the gateway replica started.",
            registry=registry,
        )
        self.incoming_bytes = Gauge(
            "disagg_incoming_bytes",
            "Bytes of request bodies that are on their way in at the moment, and not sent on yet "
            "(gateway.max_incoming_bytes).",
            registry=registry,
        )
        self.shadow_checks = Counter(
            "disagg_shadow_checks",
            "Greedy answers that were to be computed again without a hand-off (gateway.shadow_check_every): same, "
            "different, tie (different where two tokens are nearly as likely), skipped (busy, or no KV had moved), "
            "failed (no second answer).",
            ["outcome"],
            registry=registry,
        )
        self.kv_path_verified = Gauge(
            "disagg_kv_path_verified",
            "Whether the last warm-up or shadow check of a pair proved that KV moves and is right: 1 or 0. Once KV was "
            "found wrong, only a shadow check can make it 1 again.",
            ["prefill", "decode"],
            registry=registry,
        )
        self.disconnects = Counter(
            "disagg_client_disconnects",
            "Clients that left before their answer was complete, and requests that Serve's proxy cancelled, by phase "
            "(prefill, decode, stream).",
            ["phase"],
            registry=registry,
        )
        self.broken_streams = Counter(
            "disagg_broken_streams",
            "Streams that ended with an error event because the decode replica was lost after the first token and no "
            "other one went on.",
            registry=registry,
        )
        self.resumes = Counter(
            "disagg_resumes",
            "Losses of a decode replica in the middle of a stream: resumed elsewhere, refused (a request or an answer "
            "that cannot be resumed) or failed (nobody to go on, or it went on differently).",
            ["outcome"],
            registry=registry,
        )
        self.resume_gap_seconds = Histogram(
            "disagg_resume_gap_seconds",
            "Time from the loss of a decode replica to the first bytes of its successor in the same stream.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.resume_diverged = Counter(
            "disagg_resume_diverged",
            "Resumed greedy streams that ended with an error event because the next replica gave another text than was "
            "sent.",
            registry=registry,
        )
        self.streams = Counter(
            "disagg_streams",
            "Streamed answers by the path their bytes took: splice (socket to socket) or asgi.",
            ["path"],
            registry=registry,
        )
        self.stream_limits = Counter(
            "disagg_stream_limit_reached",
            "Streams that ended with an error event because they took longer than gateway.max_stream_s.",
            registry=registry,
        )
        self.key_reloads = Counter(
            "disagg_api_key_reloads",
            "Changes of the file of API keys, by whether they were taken over (ok) or the old keys stay (failed).",
            ["outcome"],
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
        self.quarantines = Counter(
            "disagg_quarantines",
            "Replicas that were taken out of routing although they may live, by reason: hang, probe_failed, listener, "
            "unanswered.",
            ["pool", "reason"],
            registry=registry,
        )
        self.crash_loops = Counter(
            "disagg_crash_loops",
            "Times that a pool began to lose one replica after the other: three within 120 s, by this gateway's count.",
            ["pool"],
            registry=registry,
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

    def leg_over(self, kind: str, outcome: str, seconds: float) -> None:
        """Take the time of a prefill leg; other legs are ignored. See `pools.client.replica.LegObserver`."""
        if kind == "prefill":
            self.prefill_seconds.observe(seconds)

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

    def count_foreign(self, word: str, tokens: int, num_bytes: int) -> None:
        """Take over an addition to the books of other gateways' hand-offs."""
        self.foreign_handoffs.labels(word).inc()

    def quarantined(self, pool: str, reason: str) -> None:
        """Count a replica that was taken out of routing."""
        self.quarantines.labels(pool, reason if reason in QUARANTINES else "other").inc()

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
