# SPDX-License-Identifier: Apache-2.0
"""What is borrowed from other packages: the lists against running processes, and against vLLM's next release."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil

from scripts.check_upstream import check
from tests.prove.report import ROOT, Row
from tests.support.replaced import ask, listed
from tests.support.stack import running
from tests.support.tiers import tiers
from transport.upstream.names import Process

LINE, REPORT_LINE = 8, 9
NEXT = "vllm==0.33.0"
MOST_S = 120.0
TITLES: tuple[tuple[str, Process], ...] = (
    ("VLLM::EngineCore", "engine_core"),
    ("VLLM::Worker", "worker"),
    (":gateway", "gateway"),
    (":prefill", "api"),
    (":decode", "api"),
    ("pools.cache_server.main", "cache_server"),
    ("disagg.cli.serve_child", "serve_child"),
)
"""Part of a command line of each kind of process, the narrowest first."""


def replaced() -> list[Row]:
    """Line 8: each process of an application says what it has replaced; and the list on both platforms."""
    config = ROOT / "configs" / "quickstart.yaml"
    with running(config, name="prove-house-replaced", change=tiers(sink="unused")) as stack:
        found = list(_processes(stack.process.pid))
        rows = [_row(kind, process) for kind, process in found]
        kinds = {kind for kind, _ in found}
        expected = {kind for _, kind in TITLES}
        missing = ", ".join(sorted(expected - kinds)) or "none"
        rows.insert(0, Row(LINE, "kinds of processes without an answer", missing, "none", kinds == expected))
    return [*rows, _both_platforms()]


def _processes(pid: int) -> Iterator[tuple[Process, psutil.Process]]:
    for process in psutil.Process(pid).children(recursive=True):
        title = " ".join(process.cmdline())
        kind = next((kind for part, kind in TITLES if part in title and "child.py" not in title), None)
        if kind is not None:
            yield kind, process


def _row(kind: Process, process: psutil.Process) -> Row:
    names, wanted = ask(process.pid), listed(kind)
    short = ", ".join(sorted(name.rpartition(":")[2] for name in names)) or "nothing"
    for name in sorted(names ^ wanted):
        print(f"    {kind} {process.pid}: {name} is {'not listed' if name in names else 'not replaced'}")
    return Row(
        LINE, f"{kind}: replaced are {short}"[:58], str(len(names)), f"{len(wanted)}, as listed", names == wanted
    )


def _both_platforms() -> Row:
    test = "tests/component/test_borrowed.py::test_what_is_replaced_is_what_the_list_says"
    command = [sys.executable, "-m", "pytest", "-q", test]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return Row(LINE, "attributes before and after, on cpu and on cuda", last[:34], "2 passed", done.returncode == 0)


def newest() -> list[Row]:
    """Line 9: the report on vLLM 0.33.0; what it finds is judged by hand in the closing note."""
    started = time.monotonic()
    version, findings = check("vllm", NEXT)
    took = time.monotonic() - started
    counts: Counter[Any] = Counter(one.state for one in findings)
    for one in findings:
        if one.state != "same":
            print(f"    {one.state:<8} {one.name.name}: {one.words}")
    rows = [
        Row(REPORT_LINE, f"vLLM {version}: names that are {state}", str(n), "printed", True)
        for state, n in counts.items()
    ]
    looked_at = sum(counts.values())
    return [
        *rows,
        Row(REPORT_LINE, "names of vLLM looked at", str(looked_at), "all of the lists", looked_at > 250),
        Row(
            REPORT_LINE, "seconds, with the download where there was one", f"{took:.0f}", f"{MOST_S:g}", took <= MOST_S
        ),
    ]
