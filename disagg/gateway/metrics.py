# SPDX-License-Identifier: Apache-2.0
"""What the gateway counts, for Prometheus. `docs/metrics.md` is generated from here.

Labels have few values by construction: pools, modes, fixed reasons, status codes; never ids of requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

logger = logging.getLogger(__name__)

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
            "Hand-offs by what became of them: produced on prefill, then accepted by decode, released, or lost.",
            ["outcome"],
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
