# SPDX-License-Identifier: Apache-2.0
"""What the gateway counts and shows."""

from __future__ import annotations

import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from disagg.observability.metrics import Metrics
from tests.support.gateway_stack import running_stack


def test_two_gateways_count_apart() -> None:
    """Each gateway has a registry of its own."""
    first, second = Metrics(), Metrics()
    first.broken_streams.inc()
    assert first.registry.get_sample_value("disagg_broken_streams_total") == 1
    assert second.registry.get_sample_value("disagg_broken_streams_total") == 0


def test_every_metric_is_described() -> None:
    """Names carry the project's prefix, every metric has a sentence, and there is no series for its creation time."""
    metrics = Metrics()
    families = list(metrics.registry.collect())
    assert len(families) >= 14
    for family in families:
        assert family.name.startswith("disagg_")
        assert len(family.documentation) > 20 and family.documentation.endswith(".")
    metrics.requests.labels("chat", "handoff", "200").inc()
    assert b"_created" not in metrics.render()


def test_gauges_are_refreshed_before_each_exposition() -> None:
    """A callback sets gauges when somebody looks."""
    metrics = Metrics()
    looks: list[int] = []
    metrics.on_render(lambda: looks.append(1))
    metrics.on_render(lambda: metrics.in_flight.set(len(looks)))
    metrics.render()
    assert b"disagg_requests_in_flight 2.0" in metrics.render()


def test_local_prefills_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Each reason is logged once and counted always."""
    metrics = Metrics()
    with caplog.at_level(logging.WARNING, logger="disagg.observability.metrics"):
        for reason in ("short", "short", "beam_search", "short"):
            metrics.local_prefill(reason)
    assert [("short" in r.getMessage(), "beam" in r.getMessage()) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]
    assert metrics.registry.get_sample_value("disagg_local_prefills_total", {"reason": "short"}) == 3


async def test_exposition_over_http() -> None:
    """`/metrics` is Prometheus text with few label values and no ids of requests."""
    async with running_stack(num_decode=2) as stack:
        for _ in range(2):
            await stack.complete()
            await stack.chat(stream=True)
        await stack.complete(n=2)
        await stack.call("GET", "/no/such/route")
        reply = await stack.call("GET", "/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(reply.body.decode())
            for sample in family.samples
        }
        requests = {labels: n for (name, labels), n in samples.items() if name == "disagg_requests_total"}
        assert requests == {
            (("code", "200"), ("endpoint", "completions"), ("mode", "handoff")): 2,
            (("code", "200"), ("endpoint", "chat"), ("mode", "handoff")): 2,
            (("code", "200"), ("endpoint", "completions"), ("mode", "primed")): 1,
            (("code", "404"), ("endpoint", "other"), ("mode", "none")): 1,
        }
        assert samples["disagg_warm_pairs", ()] == 2
        assert samples["disagg_replicas", (("pool", "decode"), ("state", "routable"))] == 2
        assert samples["disagg_prefill_leg_seconds_count", ()] == 5
        assert samples["disagg_time_to_first_byte_seconds_count", ()] == 5
        assert not any("cmpl" in str(labels) for _, labels in samples)
