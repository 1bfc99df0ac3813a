# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.probes`: what watching an idle engine costs, with and without in turns in one run.

A real prefill engine on this machine's CPUs, with the NIXL listener, in the process of the benchmark as in a replica.
Watched means what its replica does for health: the token it is asked for, its listener, the record of its shared
memory. What gateways ask over HTTP is not in it. Prints CPU seconds per second of the engine and all its processes,
writes build/probes.json, and exits with 1 when the medians are a bound or more apart. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
from pathlib import Path

import uvloop

from benchmarks.cpu import CpuMeter, descendants
from pools.config import CpuConfig, PoolConfig
from pools.engine.base import Engine
from pools.health.hang_limits import hang_limits
from pools.health.listener_probe import nixl_probe
from pools.health.watchdog import PROMPT, Watchdog
from pools.plan.launch import engine_env
from pools.process.shared_files import SharedFiles
from pools.process.tree import cpu_seconds
from tests.support.engines import transfer_launch
from tests.support.stack import free_port
from transport.config import NixlConfig

MAX_SHARE = 0.01
_HOST = "127.0.0.1"
_SETTLE_S = 10.0
"""After the first requests: allocators and vLLM's queues come to rest."""


async def start_engine(side_channel_port: int) -> Engine:
    """A prefill engine as `pools.replica.replica` starts one. Sets this process' environment."""
    arguments, env = transfer_launch("prefill", NixlConfig(), listener_port=side_channel_port)
    os.environ.update(env | engine_env("cpu", CpuConfig(), host=_HOST))
    # Imports vLLM, which reads that environment.
    from pools.engine.vllm_engine import VllmEngine

    engine = VllmEngine(arguments)
    await engine.start()
    return engine


async def measure(engine: Engine, side_channel_port: int, *, watched: bool, seconds: float) -> tuple[float, int]:
    """Share of one CPU over `seconds`, and how many probes were answered in that time.

    Raises:
        RuntimeError: the watchdog gave the engine up.
    """
    given_up: list[str] = []
    watchdog = Watchdog(
        engine,
        probe_interval_s=PoolConfig().probe_interval_s,
        limits=hang_limits(PoolConfig(), None),
        on_hang=given_up.append,
        carrying=lambda: False,
        listener=nixl_probe(_HOST, side_channel_port),
        cpu_s=cpu_seconds,
    )
    shared_files = SharedFiles()
    if watched:
        shared_files.start()
        watchdog.start()
        await asyncio.to_thread(shared_files.started)
    try:
        meter = CpuMeter(lambda: {"engine": descendants([os.getpid()])})
        await asyncio.sleep(seconds)
        share = meter.read()["engine"] / meter.elapsed_s
    finally:
        watchdog.stop()
        if watched:
            shared_files.stop()
    if given_up:
        raise RuntimeError(f"the watchdog gave the engine up: {given_up[0]}")
    return share, watchdog.health().num_probes


async def run(turns: int, seconds: float) -> dict[bool, list[float]]:
    """Shares of one CPU of an unwatched and of a watched engine. `turns`: of each kind."""
    port = free_port()
    engine = await start_engine(port)
    shares: dict[bool, list[float]] = {False: [], True: []}
    num_probes = 0
    try:
        for _ in range(20):
            await engine.probe(PROMPT)
        await asyncio.sleep(_SETTLE_S)
        for turn in range(2 * turns):
            # Which comes first alternates, so that a drift of the machine falls on both.
            watched = turn % 4 in (1, 2)
            share, answered = await measure(engine, port, watched=watched, seconds=seconds)
            shares[watched].append(share)
            num_probes += answered
            print(
                f"{'watched  ' if watched else 'unwatched'} {100 * share:5.2f} % of a CPU, {answered} probes",
                flush=True,
            )
    finally:
        await engine.shutdown()
    if not num_probes:
        raise RuntimeError("no probe was answered; a turn has to be longer than probe_interval_s")
    return shares


def report(shares: dict[bool, list[float]]) -> bool:
    """Print and write the difference. Whether the bound holds."""
    added = statistics.median(shares[True]) - statistics.median(shares[False])
    holds = added < MAX_SHARE
    print(
        f"watching adds {100 * added:.2f} % of a CPU; bound: below {100 * MAX_SHARE:g} %: {'holds' if holds else 'NO'}"
    )
    result = {"unwatched": shares[False], "watched": shares[True], "added": added, "bound": MAX_SHARE, "holds": holds}
    Path("build").mkdir(exist_ok=True)
    Path("build/probes.json").write_text(json.dumps(result, indent=2) + "\n")
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4, help="of each kind")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a turn")
    args = parser.parse_args()
    if args.turns < 1 or args.seconds <= 2 * PoolConfig().probe_interval_s:
        parser.error("at least one turn, and a turn longer than two probe intervals")
    logging.basicConfig(level=logging.WARNING)
    raise SystemExit(not report(uvloop.run(run(args.turns, args.seconds))))


if __name__ == "__main__":
    main()
