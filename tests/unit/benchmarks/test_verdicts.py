# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks conclude from figures, and the page they write."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.__main__ import cpu_rows, latency_rows, text
from benchmarks.page import page
from benchmarks.real import SIDES, Sample, compare


def sample(prompt: int, *, ttft_s: float, itl_s: float, words: str = "abc") -> Sample:
    """A finished sample with one event for each letter of `words`."""
    found = Sample(prompt, started_at=1.0, prefilled_at=1.0)
    for i, word in enumerate(words):
        found.feed(b'data: {"choices":[{"text":"%s"}]}\n\n' % word.encode(), 1.0 + ttft_s + i * itl_s)
    found.feed(b"data: [DONE]\n\n", 2.0)
    found.finish(200, len(words))
    return found


def real(added_ttft_s: float, itl_factor: float) -> dict[str, Any]:
    """The comparison of six requests of which the gateway's are slower."""
    hand = [sample(i, ttft_s=0.05, itl_s=0.01) for i in range(6)]
    gateway = [sample(i, ttft_s=0.05 + added_ttft_s, itl_s=0.01 * itl_factor) for i in range(6)]
    return {"haproxy": {"1": compare(dict(zip(SIDES, (hand, gateway), strict=True)))}}


def hop(us_per_token: float, us_per_request: float, errors: int = 0) -> dict[str, Any]:
    """Results of HAProxy and the router with one repeat."""
    found: dict[str, Any] = {}
    for name, token, request in (("vllm-router", 40.0, 400.0), ("disagg-haproxy", us_per_token, us_per_request)):
        costs = {"us_per_token": token, "us_per_request": request}
        median = costs | {"tokens": 10, "errors": errors, "reconnects": 0, "parts": {"gateway": costs}}
        median |= {"tokens_per_s": 800.0, "ttft_p50_ms": 5.0, "itl_p50_ms": 20.0, "itl_p99_ms": 22.0}
        found[name] = {"16": {"median": median, "repeats": [costs]}}
    return found


@pytest.mark.parametrize(
    ("added_ttft_s", "itl_factor", "holds"), [(0.005, 1.04, True), (0.007, 1.0, False), (0.0, 1.06, False)]
)
def test_latency_is_judged_behind_haproxy(added_ttft_s: float, itl_factor: float, holds: bool) -> None:
    """More than 6 ms of TTFT or 5 % of ITL is too much."""
    assert all(row["holds"] for row in latency_rows(real(added_ttft_s, itl_factor))) is holds


@pytest.mark.parametrize(
    ("token", "request_us", "errors", "holds"),
    [(60.0, 2000.0, 0, True), (61.0, 1.0, 0, False), (1.0, 2001.0, 0, False), (1.0, 1.0, 1, False)],
)
def test_cpu_is_judged_behind_haproxy(token: float, request_us: float, errors: int, holds: bool) -> None:
    """More than 60 µs a token or 2 ms a request is too much, and so is one broken answer."""
    assert all(row["holds"] for row in cpu_rows(hop(token, request_us, errors))) is holds


def test_another_answer_fails() -> None:
    """An answer through the gateway that differs from the one by hand does not hold."""
    samples = {
        side: [sample(0, ttft_s=0.1, itl_s=0.01, words=w)] * 2 for side, w in zip(SIDES, ("abc", "acb"), strict=True)
    }
    rows = latency_rows({"haproxy": {"1": compare(samples)}})
    assert [row["what"] for row in rows if not row["holds"]] == ["answers equal to those by hand, 1 client"]


@pytest.mark.parametrize(
    ("data", "status", "error"),
    [
        (b'data: {"error":{"message":"lost"}}\n\ndata: [DONE]\n\n', 200, "lost"),
        (b'data: {"choices":[{"text":"a"}]}\n\n', 200, "ended: False"),
        (b'{"error":{}}', 503, "status 503"),
    ],
)
def test_a_broken_stream_is_an_error(data: bytes, status: int, error: str) -> None:
    """An error event, a stream without an end and a refusal are errors of the request."""
    broken = Sample(0)
    broken.feed(data, 1.0)
    broken.finish(status, 3)
    assert broken.error is not None and error in broken.error


def test_the_page_shows_every_row() -> None:
    """The page holds the verdicts and both tables."""
    results, costs = real(0.001, 1.01), hop(50.0, 1000.0)
    where = {"cpu": "x", "cores": 2, "memory_gib": 1.0, "kernel": "6", "versions": {"ray": "2"}, "date": "2026-01-01"}
    found = {
        "machine": where | {"load_at_start": 0.1},
        "minutes": 1.0,
        "plans": {
            "real": {"requests": 6, "prompt_tokens": 500, "max_tokens": 3},
            "hop": {"itl_ms": 20.0, "repeats": 1, "tokens": 500},
        },
        "real": results,
        "hop": costs,
        "rows": latency_rows(results) + cpu_rows(costs),
    }
    written = page(found)
    assert all(row["what"] in written and row["figure"] in written for row in found["rows"])
    assert "1.25 of the router" in text(found["rows"])
