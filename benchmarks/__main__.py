# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: what the gateway costs, against calling by hand and against the Rust router.

Prints the figures with their bounds, writes build/bench.json and, unless `--quick`, docs/benchmarks.md. The exit code
is 1 when a bound does not hold.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks import hop, real
from benchmarks.page import machine, page, verdict

MAX_ADDED_TTFT_MS = 6.0
MAX_ADDED_ITL_PERCENT = 5.0
MAX_US_PER_TOKEN = 60.0
MAX_US_PER_REQUEST = 2000.0
_FRONTS = {"haproxy": "HAProxy", "proxy": "classic proxy"}
Row = dict[str, Any]


def row(what: str, figure: str, bound: str = "", holds: bool = True) -> Row:
    """One figure; without a bound it is there for comparison."""
    return {"what": what, "figure": figure, "bound": bound, "holds": holds}


def latency_rows(results: dict[str, Any]) -> list[Row]:
    """Part (a). One client behind HAProxy is judged, the rest is shown."""
    rows: list[Row] = []
    num_requests = num_errors = num_alike = num_pairs = 0
    for front, by_clients in results.items():
        for clients, result in by_clients.items():
            judged = front == "haproxy" and clients == "1"
            num_requests += 2 * result["pairs"] + result["errors"]
            num_errors += result["errors"]
            if clients == "1":
                num_pairs += result["pairs"]
                num_alike += result.get("same_answers", 0)
            where = f"{_FRONTS[front]}, {clients} client{'s' if clients != '1' else ''}"
            if not result["pairs"]:
                rows.append(row(f"latency behind {where}", f"no answer: {result['error_sample'][:1]}", "some", False))
                continue
            ttft, itl = result["added_ttft_ms"]["p50"], result["added_itl_percent"]["p50"]
            hand, gateway = result["hand"], result["gateway"]
            rows.append(
                row(
                    f"added TTFT p50, {where}",
                    f"{ttft:.1f} ms ({hand['ttft_ms']['p50']:.1f} to {gateway['ttft_ms']['p50']:.1f})",
                    f"at most {MAX_ADDED_TTFT_MS:g} ms" if judged else "",
                    ttft <= MAX_ADDED_TTFT_MS or not judged,
                )
            )
            rows.append(
                row(
                    f"added ITL p50, {where}",
                    f"{itl:.1f} % ({hand['itl_ms']['p50']:.2f} to {gateway['itl_ms']['p50']:.2f} ms)",
                    f"at most {MAX_ADDED_ITL_PERCENT:g} %" if judged else "",
                    itl <= MAX_ADDED_ITL_PERCENT or not judged,
                )
            )
    rows.append(row("failed requests, real engines", f"{num_errors} of {num_requests}", "0", not num_errors))
    figure = f"{num_alike} of {num_pairs}"
    rows.append(row("answers equal to those by hand, 1 client", figure, "all", num_alike == num_pairs))
    return rows


def cpu_rows(results: dict[str, Any]) -> list[Row]:
    """Part (b). HAProxy is judged; the ratio to the router stands beside each figure."""
    rows: list[Row] = []
    num_tokens = num_errors = 0
    for name, by_streams in results.items():
        for streams, result in by_streams.items():
            found = result["median"]
            num_tokens += found["tokens"]
            num_errors += found["errors"]
            if name == "direct":
                continue
            judged = name == "disagg-haproxy"
            baseline = hop.baseline_of(name)
            base = results.get(baseline, {}).get(streams, {}).get("median")
            for key, unit, most in (
                ("us_per_token", "a token", MAX_US_PER_TOKEN),
                ("us_per_request", "a request", MAX_US_PER_REQUEST),
            ):
                cost = found[key]
                ratio = f", {cost / base[key]:.2f} of the router" if base and name != baseline else ""
                what = f"CPU {unit}, {name}, {streams} streams"
                bound = f"at most {most:.0f} µs" if judged else ""
                rows.append(row(what, f"{cost:.0f} µs{ratio}", bound, cost <= most or not judged))
    what = "answers with a lost, doubled or reordered chunk"
    rows.append(row(what, f"{num_errors} ({num_tokens} tokens checked)", "0", not num_errors))
    return rows


def run(quick: bool) -> dict[str, Any]:
    """Both parts. `rows` is what was to be shown; a part that cannot be run is a row that does not hold."""
    started = time.monotonic()
    hop.BUILD.mkdir(exist_ok=True)
    real_plan = real.Plan(requests=24) if quick else real.Plan()
    hop_plan = hop.Plan(repeats=1, tokens=200, requests=200) if quick else hop.Plan()
    found: dict[str, Any] = {
        "quick": quick,
        "machine": machine(),
        "plans": {"real": asdict(real_plan), "hop": asdict(hop_plan)},
        "real": {},
        "hop": {},
        "rows": [],
    }
    _part(found, "real", lambda: real.run(real_plan), latency_rows)
    _part(found, "hop", lambda: hop.run_with_own_steps(hop_plan), cpu_rows)
    found["minutes"] = round((time.monotonic() - started) / 60, 1)
    return found


def _part(
    found: dict[str, Any], name: str, measure: Callable[[], dict[str, Any]], rows: Callable[[dict[str, Any]], list[Row]]
) -> None:
    try:
        found[name] = measure()
        found["rows"] += rows(found[name])
    except Exception as exc:  # the other part takes minutes and is worth having
        traceback.print_exc()
        found["rows"].append(row(f"part {name}", f"{type(exc).__name__}: {exc}"[:120], "can be run", False))


def text(rows: list[Row]) -> str:
    """The rows for a terminal."""
    return "\n".join(f"{verdict(r).strip('*'):<6} {r['what']:<52} {r['figure']:<34} {r['bound']}" for r in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer requests and one repeat; docs/ stays as it is")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything started is ended
    found = run(parser.parse_args().quick)
    (hop.BUILD / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    if not found["quick"]:
        (hop.ROOT / "docs" / "benchmarks.md").write_text(page(found))
    print(text(found["rows"]))
    failed = [row for row in found["rows"] if not row["holds"]]
    print(f"{len(failed)} of {len(found['rows'])} rows fail; {found['minutes']} minutes; build/bench.json")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
