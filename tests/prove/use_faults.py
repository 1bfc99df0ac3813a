# SPDX-License-Identifier: Apache-2.0
"""Line 1: each fault: the smallest input, what happened, what is right, the tests that hold it, and its kind's others.

The tests run here, so a row holds only if they pass now.
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from tests.prove.report import ROOT, Row

LINE = 1
U = "tests/unit"
G = f"{U}/disagg/gateway"


@dataclass(frozen=True)
class Fault:
    """One fault and its kind."""

    number: int
    given: str
    before: str
    right: str
    tests: Sequence[str]
    others: Sequence[str]
    """Other instances of the kind, found and mended."""


FAULTS = (
    Fault(
        1,
        "an engine that dies at start",
        "starting: prefill 0/1 ready, for half an hour",
        "the root cause at once; after the third death the end, with it",
        (f"{U}/disagg/cli/test_starting.py", f"{G}/test_serve_plan.py"),
        (
            "EngineCore killed by a signal, named",
            "a worker's error behind EngineCore's",
            "Ray ends a process for memory",
            "a place that no node has",
            "DEPLOY_FAILED",
            "two runs in one folder, a log each",
            "the admin key of a first start",
        ),
    ),
    Fault(
        2,
        "1P1D, the decode engine is killed",
        "31 s of 503",
        "prefill answers alone, within a budget of its own, and streams go on there",
        (f"{G}/handoff/test_prefill_alone.py", f"{G}/test_told_alike.py"),
        (
            "decode that answers 5xx",
            "the last decode replica that hangs",
            "/health, admin, SDK and gauges say who serves",
        ),
    ),
    Fault(
        3,
        "JSON nested 970 deep",
        "500, and the prefill's KV is pinned",
        "400; a hand-off is settled whatever ends it",
        (f"{G}/front/test_body.py", f"{G}/handoff/test_prefilling.py"),
        ("100,000 containers beside one another", "an exception between the legs", "deep values in disagg_store"),
    ),
    Fault(
        4,
        "HTTP_PROXY, ALL_PROXY=socks5://, http_options.ssl_*",
        "asks the proxy for a loopback address; a traceback; http:// of a TLS server",
        "no proxy for loopback, one line for each error, https:// and --ca-file",
        (f"{U}/disagg/sdk/test_http.py", f"{U}/disagg/cli"),
        (
            "a proxy that is no URL",
            "IPv6 addresses",
            "certificate files that are not there",
            "a self-signed certificate",
        ),
    ),
    Fault(
        5,
        "priority: -7",
        "reached decode alone",
        "goes on both legs and the probe",
        (f"{U}/pools/client/test_messages.py", f"{G}/handoff/test_handoff.py"),
        ("session_id", "cache_salt", "a table of every field of vLLM's requests"),
    ),
    Fault(
        6,
        "dtype: bf16",
        "ok",
        "refused with its path, what is allowed, and the nearest that exists",
        (f"{U}/disagg/advice/test_values.py", "tests/component/test_engine_values.py"),
        (
            "names of vLLM's registries: parsers, backends, quantizations",
            "values inside of mappings: speculative_config, compilation_config",
            "arguments that reach the private engine but no client",
            "arguments that only work together",
            "xxhash with what outlives a process",
        ),
    ),
    Fault(
        7,
        "a cold prompt with n: 2",
        "896 cached tokens a choice",
        "0",
        (f"{G}/stream/test_usage.py", f"{U}/pools/engine/fake"),
        (
            "lists of prompts",
            "Mooncake",
            "NIXL push",
            "a second choice that shares the first one's blocks",
            "a prompt that decode had and prefill had not",
        ),
    ),
    Fault(
        8,
        "Connection: Upgrade, Upgrade: h2c",
        "not valid JSON",
        "our ports ignore the offer; an empty or cut body says so",
        (f"{U}/transport/test_bounded_http.py", f"{G}/front/test_body.py", f"{G}/front/test_edge.py"),
        ("CONNECT", "gzip and deflate bodies", "CORS", "HEAD", "X-Accel-Buffering"),
    ),
    Fault(
        9,
        "pip install .[gpu]",
        "Mooncake cannot be imported",
        "every library is in the set, the image or the driver",
        (f"{U}/scripts", f"{U}/test_packaging.py"),
        (),
    ),
    Fault(
        10,
        "a hybrid model with shared_cache on platform cpu",
        "a warning, and the engine dies",
        "refused with what helps; one table for every transport, tier, layout and platform",
        (f"{U}/disagg/advice/test_fit_layouts.py", f"{U}/transport/test_parts.py", f"{U}/disagg/pages"),
        (
            "MLA with a sink that stores",
            "sliding windows with sinks that act on what is left",
            "short convolution over NIXL",
            "encoder-decoders",
            "a hybrid model without vLLM's hybrid KV cache manager",
            "prefill in pipeline stages",
        ),
    ),
    Fault(
        11,
        "a chat of 390,000 parts",
        "every stream stands still for 5 s",
        "400 before pydantic sees it; large bodies are validated and rendered beside the loop",
        (f"{G}/front/test_body.py", f"{G}/front/test_intake.py", f"{G}/replicas/test_watch.py"),
        ("messages", "tools", "token ids", "connects of a loop that was late itself blame no replica"),
    ),
    Fault(
        12,
        "a second request on the connection, and the client leaves",
        "the first one runs to its last token",
        "every unfinished cycle ends",
        (f"{U}/transport/test_bounded_http.py",),
        ("a client that is gone without a word, by the kernel's view of the connection",),
    ),
    Fault(
        13,
        "30 connections that hold back a last megabyte",
        "265 MiB beside every count",
        "counted from the head on, and a budget: 503 and Retry-After beyond",
        (f"{G}/front/test_body.py",),
        ("compressed bodies count what they become",),
    ),
    Fault(
        14,
        "image_url of a metadata service",
        "fetched",
        "refused, after redirects and names too",
        ("tests/component/test_vllm_media.py",),
        ("the gateway's renderer", "IPv4 in IPv6", "names that resolve to private addresses"),
    ),
)


def each_fault() -> list[Row]:
    rows = []
    for fault in FAULTS:
        passed, failed = _run(fault.tests)
        print(f"    {fault.number}: {fault.given}: {fault.before} -> {fault.right}")
        for other in fault.others:
            print(f"        also: {other}")
        holds = passed > 0 and failed == 0
        rows.append(
            Row(LINE, f"{fault.number}: {fault.right}"[:58], f"{passed} tests passed, {failed} not", "all", holds)
        )
    return rows


def _run(tests: Sequence[str]) -> tuple[int, int]:
    report = ROOT / "build" / "prove-use-tests.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if outcome.returncode != 0:
        print(outcome.stdout[-3000:])
    if not report.exists():
        return 0, 1
    suites = ET.parse(report).getroot().iter("testsuite")
    total, bad = 0, 0
    for suite in suites:
        counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
        bad += counts["failures"] + counts["errors"] + counts["skipped"]
        total += counts["tests"]
    return total - bad, bad
