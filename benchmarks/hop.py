# SPDX-License-Identifier: Apache-2.0
"""CPU that one streamed token and one request cost between client and engine, against vllm-router.

Fake engines at a 20 ms cadence, the load generator and each front run as processes of their own. A front's cost is
the CPU of the processes that carry the stream: proxy or HAProxy plus gateway, or the router. What it burns when
idle is measured before and taken off. Answers of several lengths give the cost of a request and of a token as the
two coefficients of a line. Ray's daemons are no part of it and are reported beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cpu import CpuMeter, command, descendants
from disagg.tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
ROUTER_VENV = BUILD / "vllm-router-venv"
ROUTER_VERSION = "0.1.17"
TINY_MODEL = BUILD / "bench-tiny-model"
"""The gateway tokenises with a real tokenizer, also in front of fake engines."""
FRONTS = ("direct", "vllm-router", "disagg-haproxy", "disagg-proxy")
OWN_STEPS = ", tokens one by one"
"""Marks a front over engines that give every token alone. For comparison: an engine's batch has steps."""
BASELINE = "vllm-router"
HOP = ("gateway", "proxy", "router")
"""Groups of processes that carry a stream."""
PARTS = {
    "gateway": "gateway",
    "proxy": "proxy in front of it",
    "router": "router",
    "background": "Ray's daemons, not counted",
}
_START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    streams: tuple[int, ...] = (16, 100)
    repeats: int = 3
    tokens: int = 300
    """Length of the long answers, one a stream."""
    requests: int = 240
    """One-token requests; half as many have 20 tokens."""
    itl_ms: float = 20.0
    shared_steps: bool = True
    """Whether an engine gives a token to all of its streams in one step, as a real one does."""
    idle_s: float = 4.0
    """How long the idle cost is looked at before each measurement."""

    def runs(self, streams: int) -> tuple[tuple[int, int], ...]:
        """Number of requests and length of the answers of each load, from which the line is fitted."""
        return ((self.requests, 1), (self.requests // 2, 20), (streams, self.tokens))


@dataclass(frozen=True)
class Front:
    """Something that is up: where clients go, and which processes are its own."""

    url: str
    groups: Callable[[], dict[str, set[int]]]
    """Process ids by group; those of `HOP` are what is measured."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path} | extra


@contextlib.contextmanager
def child(argv: list[str], log: Path, *, interrupt: bool = False, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone when the context ends, with every process it started."""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            argv, env=environment(**extra), stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT
        )
    try:
        yield process
    finally:
        family = descendants([process.pid])
        process.send_signal(signal.SIGINT if interrupt else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        for pid in family - {process.pid} if process.poll() is not None else family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_healthy(url: str, process: subprocess.Popen[str], log: Path) -> None:
    """Return when `/health` answers 200. Raises RuntimeError when the process ends or takes too long."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}; see {log}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            if reply.status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{url}/health was not 200 within {_START_TIMEOUT_S:.0f} s; see {log}")


@contextlib.contextmanager
def fake_engine(role: str, plan: Plan) -> Iterator[str]:
    """One fake engine as a process; its URL."""
    argv = [
        sys.executable,
        "-m",
        "pools.engine.fake",
        "--role",
        role,
        "--itl-ms",
        str(plan.itl_ms),
        "--port",
        "0",
    ]
    argv += [] if plan.shared_steps else ["--own-steps"]
    with child(argv, BUILD / f"bench-{role}.log") as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


@contextlib.contextmanager
def direct(plan: Plan) -> Iterator[Front]:
    """No front at all: the client at the decode engine, for the latencies."""
    with fake_engine("decode", plan) as url:
        yield Front(url, dict)


def ensure_router() -> Path:
    """The vllm-router executable, installed into an environment of its own when it is not there."""
    executable = ROUTER_VENV / "bin" / "vllm-router"
    if not executable.exists():
        venv.create(ROUTER_VENV, with_pip=True)
        pip = [str(ROUTER_VENV / "bin" / "python"), "-m", "pip", "install", "-q", f"vllm-router=={ROUTER_VERSION}"]
        subprocess.run(pip, check=True)
    return executable


@contextlib.contextmanager
def vllm_router(plan: Plan) -> Iterator[Front]:
    """vllm-router in P/D mode over two fake engines."""
    port = free_port()
    log = BUILD / "bench-vllm-router.log"
    with fake_engine("prefill", plan) as prefill, fake_engine("decode", plan) as decode:
        argv = [str(ensure_router()), "--vllm-pd-disaggregation", "--prefill", prefill, "--decode", decode]
        argv += ["--kv-connector", "nixl", "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port)]
        argv += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()), "--log-level", "warning"]
        with child(argv, log) as process:
            url = f"http://127.0.0.1:{port}"
            wait_healthy(url, process, log)
            yield Front(url, lambda: {"router": descendants([process.pid])})


def serve_config(plan: Plan, port: int, *, haproxy: bool) -> dict[str, Any]:
    """A Serve config with one gateway, one fake prefill and one fake decode replica."""
    config: dict[str, Any] = {"http_options": {"host": "127.0.0.1", "port": port}}
    if haproxy:
        variables = {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "900",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        }
        config["controller_options"] = {"runtime_env": {"env_vars": variables}}
    application = {
        "name": "disagg",
        "route_prefix": "/",
        "import_path": "disagg.app:build",
        "external_scaler_enabled": True,
        "args": {
            "model": {"id": "tiny", "source": str(TINY_MODEL)},
            "platform": "cpu",
            "engine": {"type": "fake", "itl_ms": plan.itl_ms, "shared_steps": plan.shared_steps},
        },
        "deployments": [{"name": name, "num_replicas": 1} for name in ("gateway", "prefill", "decode")],
    }
    return config | {"applications": [application]}


def group_of(command_line: str) -> str:
    """Which group a process of a Serve application counts to."""
    if command_line.startswith("ray::ServeReplica:disagg:gateway"):
        return "gateway"
    if command_line.startswith("ray::ServeReplica:"):
        return "engine"
    program = Path(command_line.split(" ", 1)[0]).name
    if command_line.startswith(("ray::ProxyActor", "ray::HAProxyManager")) or program == "haproxy":
        return "proxy"
    return "background"


def serve_groups(root: int) -> dict[str, set[int]]:
    """Processes below `serve run`, by group."""
    groups: dict[str, set[int]] = {name: set() for name in ("gateway", "proxy", "engine", "background")}
    for pid in descendants([root]):
        groups[group_of(command(pid))].add(pid)
    return groups


@contextlib.contextmanager
def start_gateway(config_path: Path) -> Iterator[Front]:
    """The application of a Serve config under `serve run`, in a Ray of its own."""
    port = yaml.safe_load(config_path.read_text())["http_options"]["port"]
    url, log = f"http://127.0.0.1:{port}", config_path.with_suffix(".log")
    argv = [str(Path(sys.executable).parent / "serve"), "run", str(config_path)]
    with child(argv, log, interrupt=True, RAY_USAGE_STATS_ENABLED="0") as process:
        wait_healthy(url, process, log)
        yield Front(url, lambda: serve_groups(process.pid))


@contextlib.contextmanager
def disagg(plan: Plan, *, haproxy: bool) -> Iterator[Front]:
    """The disagg gateway with fake engines, behind HAProxy or Serve's own proxy."""
    if not TINY_MODEL.exists():
        write_tiny_model(TINY_MODEL)
    path = BUILD / f"bench-{'haproxy' if haproxy else 'proxy'}.yaml"
    path.write_text(yaml.safe_dump(serve_config(plan, free_port(), haproxy=haproxy)))
    with start_gateway(path) as front:
        yield front


def start(name: str, plan: Plan) -> contextlib.AbstractContextManager[Front]:
    match name:
        case "direct":
            return direct(plan)
        case "vllm-router":
            return vllm_router(plan)
        case "disagg-haproxy":
            return disagg(plan, haproxy=True)
        case "disagg-proxy":
            return disagg(plan, haproxy=False)
    raise ValueError(f"unknown front {name!r}; known: {', '.join(FRONTS)}")


def load(url: str, *, streams: int, requests: int, max_tokens: int, seed: int) -> dict[str, Any]:
    """What one run of the load generator found."""
    argv = [sys.executable, "-m", "benchmarks.load", "--url", url, "--seed", str(seed)]
    argv += ["--streams", str(streams), "--requests", str(requests), "--max-tokens", str(max_tokens)]
    done = subprocess.run(argv, env=environment(), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def fit(lengths: Sequence[int], costs: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Weighted least squares: cost of a request with one token, and of each token after the first."""
    points = list(zip((length - 1 for length in lengths), costs, weights, strict=True))
    total = sum(weight for _, _, weight in points)
    mean_x = sum(weight * x for x, _, weight in points) / total
    mean_y = sum(weight * y for _, y, weight in points) / total
    slope = sum(weight * (x - mean_x) * (y - mean_y) for x, y, weight in points)
    slope /= sum(weight * (x - mean_x) ** 2 for x, _, weight in points)
    return mean_y - slope * mean_x, slope


def measure(front: Front, plan: Plan, *, streams: int, seed: int) -> dict[str, Any]:
    """One repeat: an idle interval, then answers of each length; microseconds a request and a token, by part."""
    meter = CpuMeter(front.groups)
    time.sleep(plan.idle_s)
    idle = {name: seconds / meter.elapsed_s for name, seconds in meter.read().items()}

    costs: list[dict[str, float]] = []
    found: list[dict[str, Any]] = []
    for number, (requests, tokens) in enumerate(plan.runs(streams)):
        meter = CpuMeter(front.groups)
        found.append(load(front.url, streams=streams, requests=requests, max_tokens=tokens, seed=seed + number))
        elapsed_s, used = meter.elapsed_s, meter.read()
        costs.append({name: (seconds - idle[name] * elapsed_s) / requests for name, seconds in used.items()})

    whole = [sum(cost.get(name, 0.0) for name in HOP) for cost in costs]
    # Relative errors are alike, so that the short answers decide the intercept and the long ones the slope.
    weights = [1 / max(cost, 1e-6) ** 2 for cost in whole]
    lengths = [tokens for _, tokens in plan.runs(streams)]
    request_s, token_s = fit(lengths, whole, weights)
    parts = {name: fit(lengths, [cost[name] for cost in costs], weights) for name in idle}
    long = found[-1]
    return {
        "us_per_token": 1e6 * token_s,
        "us_per_request": 1e6 * request_s,
        "parts": {name: {"us_per_token": 1e6 * t, "us_per_request": 1e6 * r} for name, (r, t) in parts.items()},
        "us_by_length": {str(tokens): round(1e6 * cost, 1) for tokens, cost in zip(lengths, whole, strict=True)},
        "idle_percent": {name: round(100 * share, 2) for name, share in idle.items()},
        "tokens": sum(result["tokens"] for result in found),
        "errors": sum(result["errors"] for result in found),
        "error_sample": [sample for result in found for sample in result["error_sample"]][:3],
        "reconnects": sum(result["reconnects"] for result in found),
        "tokens_per_s": long["tokens"] / long["duration_s"],
        "ttft_p50_ms": long["ttft_ms"]["p50"],
        "itl_p50_ms": long["itl_ms"]["p50"],
        "itl_p99_ms": long["itl_ms"]["p99"],
        "machine_load": os.getloadavg()[0],
    }


def run_with_own_steps(plan: Plan) -> dict[str, Any]:
    """`run`, and beside it the router and HAProxy at the smallest number of streams with every token alone."""
    alone = replace(plan, streams=(min(plan.streams),), shared_steps=False)
    extra = run(alone, (BASELINE, "disagg-haproxy"))
    return run(plan) | {name + OWN_STEPS: by_streams for name, by_streams in extra.items()}


def run(plan: Plan, fronts: Sequence[str] = FRONTS) -> dict[str, Any]:
    """Every front in turn, the whole round again for each repeat; repeats and medians by front and streams."""
    repeats: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {str(streams): [] for streams in plan.streams} for name in fronts
    }
    for repeat in range(plan.repeats):
        for name in _rotated(fronts, repeat):
            with start(name, plan) as front:
                load(front.url, streams=max(plan.streams), requests=2 * max(plan.streams), max_tokens=20, seed=0)
                for streams in plan.streams:
                    result = measure(front, plan, streams=streams, seed=10 * repeat + 1)
                    repeats[name][str(streams)].append(result)
                    print(f"fake engines, {name}, {streams}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return {
        name: {streams: {"median": medians(found), "repeats": found} for streams, found in by_streams.items()}
        for name, by_streams in repeats.items()
    }


def _rotated(fronts: Sequence[str], by: int) -> list[str]:
    first = by % len(fronts)
    return [*fronts[first:], *fronts[:first]]


_MEDIANS = ("us_per_token", "us_per_request", "tokens_per_s", "ttft_p50_ms", "itl_p50_ms", "itl_p99_ms")


def medians(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the repeats; tokens and errors are summed."""
    result: dict[str, Any] = {key: _median(repeat[key] for repeat in repeats) for key in _MEDIANS}
    result |= {key: sum(repeat[key] for repeat in repeats) for key in ("tokens", "errors", "reconnects")}
    result["parts"] = {
        name: {key: _median(repeat["parts"][name][key] for repeat in repeats) for key in keys}
        for name, keys in repeats[0]["parts"].items()
    }
    return result


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 2)


def baseline_of(front: str) -> str:
    """The row that a front is compared with: the router over the same kind of engines."""
    return BASELINE + OWN_STEPS if front.endswith(OWN_STEPS) else BASELINE


def table(results: dict[str, Any]) -> str:
    """The medians as Markdown, with the ratio to vllm-router."""
    columns = ("front", "streams", "µs/token", "ratio", "µs/request", "ratio", "tokens/s", "TTFT p50", "ITL p50", "p99")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for name, by_streams in results.items():
        for streams, result in by_streams.items():
            row = result["median"]
            base = results.get(baseline_of(name), {}).get(streams, {}).get("median")
            cells = [name, streams]
            for key in ("us_per_token", "us_per_request"):
                ratio = f"{row[key] / base[key]:.2f}" if base and name != "direct" else "-"
                cells += [f"{row[key]:.1f}" if name != "direct" else "-", ratio]
            cells += [f"{row['tokens_per_s']:.0f}"]
            cells += [f"{row[key]:.2f}" for key in ("ttft_p50_ms", "itl_p50_ms", "itl_p99_ms")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parts_table(results: dict[str, Any]) -> str:
    """Where the microseconds go, as Markdown."""
    lines = ["| front | streams | part | µs/token | µs/request |", "|---|---:|---|---:|---:|"]
    for name, by_streams in results.items():
        for streams, result in by_streams.items():
            for part, cost in sorted(result["median"]["parts"].items()):
                if part != "engine":
                    cells = [name, streams, PARTS[part], f"{cost['us_per_token']:.1f}", f"{cost['us_per_request']:.0f}"]
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fronts", nargs="+", choices=FRONTS, default=list(FRONTS))
    parser.add_argument("--streams", nargs="+", type=int, default=list(Plan.streams))
    parser.add_argument("--repeats", type=int, default=Plan.repeats)
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="length of the long answers")
    parser.add_argument("--requests", type=int, default=Plan.requests, help="one-token requests")
    parser.add_argument("--output", type=Path, default=BUILD / "bench-hop.json")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything started is ended
    BUILD.mkdir(exist_ok=True)
    plan = Plan(streams=tuple(args.streams), repeats=args.repeats, tokens=args.tokens, requests=args.requests)
    results = run(plan, args.fronts)
    args.output.write_text(json.dumps({"plan": asdict(plan), "results": results}, indent=1))
    print(table(results))
    print(parts_table(results))


if __name__ == "__main__":
    main()
