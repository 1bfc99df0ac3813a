# SPDX-License-Identifier: Apache-2.0
"""Line 6: bad requests, bad configs, and 2,000 generated requests against real engines."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.prove.report import ROOT, Row
from tests.support.bad_requests import BadRequest, bad_requests, error_fault
from tests.support.openai_bodies import restricted
from tests.support.stack import Stack, running

CONFIG = ROOT / "configs" / "quickstart.yaml"
MIN_HTTP = 40
MIN_CONFIG = 20
MIN_EXAMPLES = 2000
ANSWER_S = 0.5
"""Serve's limit of a whole answer, in a header."""
STREAM_S, LONGER_S = 0.3, 0.9
"""Serve's limit cuts streams off without a word. So here the gateway has one of its own, and Serve's is longer."""


def bad_input() -> list[Row]:
    def change(config: dict[str, Any]) -> None:
        config["applications"][0]["args"]["gateway"]["max_stream_s"] = STREAM_S

    with running(CONFIG, name="prove-bad-input", change=change) as stack:
        cases = [*http_cases(stack), *config_cases()]
        return [*cases, *generated(stack, MIN_EXAMPLES, answer_s=LONGER_S), healthy(stack)]


def http_cases(stack: Stack) -> list[Row]:
    """The whole table against real engines."""
    cases = bad_requests("tiny")
    faults = [f"{case.name}: {fault}" for case in cases if (fault := send(stack, case)) is not None]
    for fault in faults:
        print(f"    {fault}")
    return [
        Row(
            6,
            "bad requests answered as the OpenAI API would",
            f"{len(cases) - len(faults)} of {len(cases)}",
            f"all, of at least {MIN_HTTP}",
            not faults and len(cases) >= MIN_HTTP,
        )
    ]


def send(stack: Stack, case: BadRequest) -> str | None:
    """What is wrong with the answer to one bad request, or None."""
    headers = dict(case.headers)
    if case.needs_admin_key:
        headers["authorization"] = f"Bearer {stack.admin_key}"
    connection = http.client.HTTPConnection(urlsplit(stack.url).netloc, timeout=60)
    try:
        if case.chunk_bytes is None:
            connection.request(case.method, case.path, case.body or None, headers)
        else:
            step = case.chunk_bytes
            pieces = (case.body[i : i + step] for i in range(0, len(case.body), step))
            try:
                connection.request(case.method, case.path, pieces, headers, encode_chunked=True)
            except (BrokenPipeError, ConnectionResetError):
                pass
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status not in case.statuses:
        return f"status {answer.status}, not one of {case.statuses}: {body[:200]!r}"
    return error_fault(answer.status, body) if case.method != "HEAD" else None


def config_cases() -> list[Row]:
    """The table of bad configs is in the unit tests; here it is run and its cases are counted."""
    tests = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "tests/unit/disagg/advice/test_check.py",
            "tests/unit/disagg/test_config.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/unit/disagg/advice/test_check.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    cases = [line for line in collected.stdout.splitlines() if "[" in line]
    print("    " + tests.stdout.strip().splitlines()[-1])
    return [
        Row(
            6,
            "bad configs refused with path, allowed values and advice",
            f"{len(cases)} cases, exit {tests.returncode}",
            f"at least {MIN_CONFIG}, exit 0",
            len(cases) >= MIN_CONFIG and tests.returncode == 0,
        )
    ]


def generated(
    stack: Stack, min_examples: int, *, phases: str = "fuzzing,coverage,examples", answer_s: float = ANSWER_S
) -> list[Row]:
    """schemathesis over the gateway's own OpenAPI document, with the bodies of `openai_bodies`; any 5xx is a failure.

    Serve's own header bounds each answer, because many of the requests ask for as many tokens as the context holds. It
    has no admin key: with one it would scale the pools to a thousand replicas. The table of bad requests has it.
    """
    report = ROOT / "build" / "schemathesis.log"
    document = restricted(httpx.get(f"{stack.url}/openapi.json", timeout=60).json(), "tiny")
    described = ROOT / "build" / "schemathesis-openapi.json"
    described.write_text(json.dumps(document))
    command = [
        str(ROOT / ".venv" / "bin" / "schemathesis"),
        "run",
        str(described),
        "--url",
        stack.url,
        "--checks",
        "not_a_server_error",
        "--max-examples",
        str(min_examples // 6),
        "--request-timeout",
        "60",
        "--header",
        f"x-request-timeout-seconds: {answer_s}",
        "--seed",
        "1",
        "--phases",
        phases,
        "--generation-database",
        "none",
    ]
    with report.open("w") as output:
        done = subprocess.run(command, cwd=ROOT / "build", stdout=output, stderr=subprocess.STDOUT, check=False)
    text = re.sub(r"\x1b\[[0-9;]*m", "", report.read_text())
    numbers = [int(n) for n in re.findall(r"(\d+) generated", text)]
    num_examples = max(numbers, default=0)
    print("\n".join("    " + line for line in text.strip().splitlines()[-12:]))
    return [
        Row(
            6,
            "schemathesis: 5xx among the generated requests",
            f"exit {done.returncode}, {num_examples} generated",
            f"none of at least {min_examples}",
            done.returncode == 0 and num_examples >= min_examples,
        )
    ]


def healthy(stack: Stack) -> Row:
    """Both engines are the ones that started, and nothing is left running."""
    stats = stack.stats()
    running_now = sum(s["num_requests_running"] for pool in stats.values() for s in pool)
    return Row(6, "requests still running in the engines afterwards", str(running_now), "0", running_now == 0)
