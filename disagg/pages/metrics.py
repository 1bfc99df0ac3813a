# SPDX-License-Identifier: Apache-2.0
"""`docs/metrics.md` as text: the metrics as `disagg.gateway` declares them, and what to alert on.

Names, types and help have their home there. Only the values of labels, which code sets one by one, are listed here;
`tests/unit/disagg/pages/test_metrics.py` compares them with the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.metrics import MetricWrapperBase

from disagg.gateway.replicas.membership import POOLS
from disagg.observability.engine_metrics import ENGINE_METRICS, LABELS, SERVER_METRICS, EngineMetric
from disagg.observability.metrics import AMOUNTS, QUARANTINES, TIERS, Metrics
from disagg.observability.outcomes import TOTALS

LOCAL_PREFILL_REASONS: Mapping[str, str] = {
    "beam_search": "the request uses beam search",
    "decode_did_not_wait": "with both legs at once, prefill took longer than `transport.kv_lease_duration_s`; the "
    "decode engine computed the prompt and the prefill leg was stopped",
    "decode_error": "the decode leg of a hand-off was answered with a status of 500 or more",
    "decode_lost": "the decode replica of a hand-off was lost before its first bytes",
    "empty_prompt": "a prompt has no token",
    "no_warm_pair": "no pair of replicas has moved KV yet, or none of them is reachable",
    "not_rendered": "vLLM's renderer took the request for invalid or unusual; the decode engine answers it, mostly "
    "with a 400",
    "prefill_lost": "every prefill replica with a warm pair was lost or failed",
    "prefill_offered_nothing": "the prefill engine answered 200 without hand-off parameters",
    "prefill_refused": "the prefill engine answered with a status from 400 to 499",
    "prefill_timeout": "the prefill leg took longer than `gateway.first_token_target_s` or `gateway.prefill_timeout_s` "
    "leave it",
    "prompt_list": "the request has more than eight prompts",
    "prompt_logprobs": "log-probabilities of the prompt are asked for, which only the engine that computes it has",
    "short": "the prompt is shorter than `gateway.min_handoff_tokens`",
}
"""Values of `reason` in `disagg_local_prefills_total`, and what each means."""

LABEL_VALUES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "disagg_requests": {
        "endpoint": ("chat", "completions", "other"),
        "mode": ("handoff", "primed", "local", "prefill", "none"),
        "code": (),
    },
    "disagg_local_prefills": {"reason": tuple(LOCAL_PREFILL_REASONS)},
    "disagg_handoffs": {"outcome": TOTALS},
    "disagg_handoff_tokens": {"outcome": AMOUNTS},
    "disagg_handoff_bytes": {"outcome": AMOUNTS},
    "disagg_stores": {"store": ("never", "always")},
    "disagg_tier_degraded": {"tier": (*TIERS, "other")},
    "disagg_leg_retries": {"leg": ("prefill", "decode")},
    "disagg_foreign_handoffs": {"outcome": TOTALS},
    "disagg_hedges": {"outcome": ("won", "lost")},
    "disagg_resumes": {"outcome": ("resumed", "refused", "failed")},
    "disagg_local_prefill_tokens": {"replica": ()},
    "disagg_shadow_checks": {"outcome": ("same", "different", "tie", "skipped", "failed")},
    "disagg_kv_path_verified": {"prefill": (), "decode": ()},
    "disagg_client_disconnects": {"phase": ("body", "prefill", "decode", "stream")},
    "disagg_streams": {"path": ("splice", "asgi")},
    "disagg_pair_warm_attempts": {"outcome": ("ok", "failed")},
    "disagg_api_key_reloads": {"outcome": ("ok", "failed")},
    "disagg_quarantines": {"pool": POOLS, "reason": (*QUARANTINES, "other")},
    "disagg_crash_loops": {"pool": POOLS},
    "disagg_replicas": {"pool": POOLS, "state": ("routable", "quarantined", "other")},
    **{metric.family: {"pool": POOLS, "replica": ()} for metric in (*ENGINE_METRICS, *SERVER_METRICS)},
}
"""Label values by metric and label, in the order of the labels; empty where they are not fixed."""

_HEAD = """# Metrics

Written by `python -m disagg.pages.generate` from `metrics.py` and `engine_metrics.py` in
`disagg/observability/`. Do not edit it by hand; the text around the tables is in `disagg/pages/metrics.py`.

## The gateway

`GET /metrics`, Prometheus text format. The counts are those of one gateway replica, and they start at 0 with it. Sum
them over gateway replicas, except `disagg_tier_degraded_total`: each gateway counts the same events of the engines, so
there the maximum counts. A scrape through Serve's HTTP port reaches any one of them; behind HAProxy scrape each gateway
replica's own port instead ([operations](operations.md#ports)). No label ever holds the id of a request.
"""

_COUNTED = """`disagg_requests_total` counts completions that were answered, and refusals. A refusal before the request
is prepared (a wrong field, route, key or size) has `endpoint="other"` and `mode="none"`, whatever its path. A client
that leaves before the first byte is counted in `disagg_client_disconnects_total` alone.
"""

_REASONS_HEAD = """### Reasons of a local prefill

`reason` in `disagg_local_prefills_total`. The first request of each reason also writes a line to the log.
"""

_HANDOFFS = """### Hand-offs add up

`disagg_handoffs_total` is the gateway's ledger. What is counted comes from the engines, not from what the gateway
believes:

    produced = consumed + released + rescued + expired + failed + disagg_open_handoffs

| outcome | the KV of a hand-off |
|---|---|
| `produced` | was computed and is held by a prefill engine |
| `consumed` | was read by a decode engine |
| `released` | was not needed and was freed at once: the client left, or the decode leg failed or was refused |
| `rescued` | was not needed or expired, and was handed to the shared cache instead of being lost |
| `expired` | was freed because nobody asked for it within its lease |
| `failed` | went with its prefill replica, or its end is among lost events (`disagg_ledger_events_lost_total`) |
| `stored` | was taken by the shared cache: all that was rescued, and what was consumed of requests that asked for it |
| `reused` | is among what was stored, and was loaded again by some request, once a hand-off |

In `disagg_handoff_tokens_total` and `disagg_handoff_bytes_total`, `orphaned` is released, rescued, expired and failed
together. `stored` and `reused` count full chunks of the cache, so they are a little less than `rescued`. A chunk that
several hand-offs have in common counts for the one that stored it first. What the sinks `write_through` and `evicted`
store is not counted here: the cache takes it from the engine's memory and knows no hand-off. A gateway counts the
hand-offs that it made itself; sum over gateway replicas. The records are in `GET /admin/v1/handoffs` and
`disagg handoffs`.

`disagg_stores_total` counts what requests said with `disagg_store`, whatever the sink makes of it: with sink `off`, and
without a shared cache, it says what was asked for and had no effect.
"""

_ENGINES = """## The engines, as the gateway sees them

Read from each replica every 5 seconds, and gone with it. Each gateway replica shows all replicas, so take the maximum
over gateways: `max by (pool, replica) (...)`. Counters start at 0 with the engine.
"""

_ALERTS = """## Worth an alert

| expression | means |
|---|---|
| `sum(disagg_replicas{pool="decode",state="routable"}) == 0` | prefill replicas answer alone; without these nothing \
is served, and `/health` is 503 |
| `disagg_warm_pairs == 0` | every prompt is computed by a decode engine |
| `rate(disagg_local_prefills_total{reason=~"prefill_.*\\|no_warm_pair\\|decode_.*"}[5m])` above a few percent of \
`rate(disagg_requests_total[5m])` | the prefill pool is lost, too slow, or too small |
| `rate(disagg_broken_streams_total[5m]) > 0` | decode replicas die or hang in the middle of answers |
| `rate(disagg_handoffs_total{outcome="expired"}[5m]) > 0` | KV waits for its lease, computed for nothing; with sink \
`unused` it is `rescued` |
| `histogram_quantile(0.01, rate(disagg_handoff_lease_left_seconds_bucket[5m])) < 2` | hand-offs nearly expire before \
they are read: the decode pool is too small, or raise `transport.kv_lease_duration_s` |
| `max by (tier) (increase(disagg_tier_degraded_total[10m])) > 0` | a tier stopped working; engines go on without it |
| `rate(disagg_ledger_events_lost_total[10m]) > 0` | the gateway is too slow to read events; outcomes become `failed` |
| `rate(disagg_local_prefills_refused_total[5m]) > 0` | clients get 429: the prefill pool is lost or too slow, and \
the decode pool cannot make up for it |
| `increase(disagg_pair_breaker_opened_total[10m]) > 3` | hand-offs of a pair of replicas fail although both work |
| `increase(disagg_api_key_reloads_total{outcome="failed"}[10m]) > 0` | the changed file of API keys cannot be used: a \
key that was taken out still works |
| `min by (prefill, decode) (disagg_kv_path_verified) == 0` for 5 m | KV does not move between two replicas, or it is \
wrong |
| `increase(disagg_shadow_checks_total{outcome="different"}[1h]) > 1` | page: answers made of handed-off KV differ \
from those computed in one place; the gateway's log names the pairs |
| `increase(disagg_quarantines_total[10m]) > 0` | a replica hung or its process did; it is replaced by itself |
| `increase(disagg_crash_loops_total[10m]) > 0` | page: the replicas of a pool die one after the other |
| `increase(disagg_pair_warm_attempts_total{outcome="failed"}[10m]) > 5` | a pair of replicas cannot move KV |
| `increase(disagg_engine_num_notifications_after_expiry_total[10m]) > 0` | page: KV was read after its lease, so an \
answer may be wrong. Raise `transport.kv_lease_duration_s` |
| `rate(disagg_engine_nixl_num_failed_transfers_total[5m]) > 0`, the same with `mooncake` | transfers fail, each costs \
a recomputation |
| `rate(disagg_engine_num_preemptions_total[5m]) > 0` | KV space is too small for `max_num_seqs` |
"""

_VLLM = """## vLLM's own metrics

Every replica serves vLLM's own `/metrics` on its private port, which is another one after each start. The URLs are in
`GET /admin/v1/pools` (`pools[].replicas[].url`; `disagg status --json` prints the same), so a scraper needs a service
discovery that reads them. Counters carry `_total` in the exposition. On a decode engine TTFT and "prefill time" include
the wait for KV.

| metric | scrape on | alert when |
|---|---|---|
| `vllm:nixl_num_notifications_after_expiry` | prefill | above 0: page. A decode engine read KV after its lease, so an \
answer may be wrong. Raise `transport.kv_lease_duration_s` |
| `vllm:nixl_num_kv_expired_reqs` | prefill | it rises steadily: requests wait too long between the legs, or decode \
replicas die |
| `vllm:nixl_num_failed_transfers` | decode | it rises: handshakes or reads fail, each costs a recomputation |
| `vllm:nixl_num_failed_notifications` | decode | it rises: prefill engines are not told that blocks are free |
| `vllm:nixl_xfer_time_seconds`, `vllm:nixl_bytes_transferred` | decode | the time per byte grows: the link is shared \
or not the one you think |
| `vllm:num_requests_kv_fetch_by_stage{stage="waiting_to_start"}` | decode | it grows: transfers queue |
| `vllm:num_requests_waiting` | both | it stays above 0: the pool is too small |
| `vllm:kv_cache_usage_perc` | both | it stays near 1: requests wait for KV space or are preempted |
| `vllm:num_preemptions` | both | it rises: KV space is too small for `max_num_seqs` |
| `vllm:external_prefix_cache_hits`, `vllm:external_prefix_cache_queries` | decode | hits stop while requests go on: \
no KV arrives, decode recomputes |
| `vllm:prompt_tokens_by_source` | decode | the locally computed share grows, for the same reason |
"""


@dataclass(frozen=True)
class MetricInfo:
    """One metric as Prometheus shows it."""

    family: str
    """Name without the suffix that a counter gets."""
    name: str
    """Name to query: with `_total` for a counter; a histogram adds `_bucket`, `_sum` and `_count`."""
    type: str
    help: str
    labels: tuple[str, ...]


def metrics() -> list[MetricInfo]:
    """Every metric of a gateway replica, in the order of its declaration."""
    own = [_info(value) for value in vars(Metrics()).values() if isinstance(value, MetricWrapperBase)]
    return [*own, *(_engine_info(metric) for metric in (*ENGINE_METRICS, *SERVER_METRICS))]


def _info(metric: MetricWrapperBase) -> MetricInfo:
    (family,) = metric.describe()
    # prometheus_client tells label names only of series that exist, and a fresh registry has none.
    labels = tuple(metric._labelnames)
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return MetricInfo(family.name, name, family.type, family.documentation, labels)


def _engine_info(metric: EngineMetric) -> MetricInfo:
    name = f"{metric.family}_total" if metric.type == "counter" else metric.family
    return MetricInfo(metric.family, name, metric.type, metric.help, LABELS)


def page() -> str:
    """The whole page as Markdown."""
    engines = {metric.family for metric in (*ENGINE_METRICS, *SERVER_METRICS)}
    own_table = _table([metric for metric in metrics() if metric.family not in engines])
    engine_table = _table([metric for metric in metrics() if metric.family in engines])
    reasons = ["| reason | the decode engine computed the prompt because |", "|---|---|"]
    reasons += [f"| `{word}` | {_cell(meaning)} |" for word, meaning in sorted(LOCAL_PREFILL_REASONS.items())]
    parts = [_HEAD, *own_table, "", _COUNTED, _REASONS_HEAD, *reasons, "", _HANDOFFS, _ENGINES, *engine_table, ""]
    return "\n".join([*parts, _ALERTS, _VLLM])


def _table(shown: Sequence[MetricInfo]) -> list[str]:
    lines = ["| name | type | labels | meaning |", "|---|---|---|---|"]
    return lines + [f"| `{m.name}` | {m.type} | {_labels(m)} | {_cell(m.help)} |" for m in shown]


def _labels(metric: MetricInfo) -> str:
    parts = []
    for label in metric.labels:
        values = LABEL_VALUES.get(metric.family, {}).get(label, ())
        if metric.family == "disagg_local_prefills":
            parts.append(f"`{label}`: see below")
        elif values:
            parts.append(f"`{label}`: " + ", ".join(f"`{value}`" for value in values))
        else:
            parts.append(f"`{label}`")
    return "; ".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
