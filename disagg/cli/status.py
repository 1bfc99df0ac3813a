# SPDX-License-Identifier: Apache-2.0
"""`disagg status`: the pools and their replicas as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from disagg.cli import connection
from disagg.sdk.messages import pending

if TYPE_CHECKING:
    from disagg.sdk.types import Pool, Replica

_HEADER = ("  REPLICA", "STATE", "RUNNING", "WAITING", "IN FLIGHT", "KV", "UPTIME")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "status", help="show the pools and their replicas", description="Show the pools and their replicas."
    )
    connection.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON; with --watch one line a snapshot")
    parser.add_argument("--watch", action="store_true", help="print again every few seconds until Ctrl-C")
    parser.add_argument(
        "--interval-s",
        type=connection.seconds,
        default=2.0,
        metavar="S",
        help="seconds between two prints of --watch (default: 2)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the pools once, or again and again."""
    with connection.client(args) as client:
        while True:
            pools = client.pools()
            if args.json:
                print(as_json(pools, indent=None if args.watch else 2), flush=True)
            else:
                print(table(pools), flush=True)
            if not args.watch:
                return 0
            time.sleep(max(args.interval_s, 0.1))
            if not args.json:
                print()


def as_json(pools: Sequence[Pool], *, indent: int | None = 2) -> str:
    """The pools in the form in which the admin API answers them."""
    return json.dumps({"pools": [pool.model_dump(mode="json") for pool in pools]}, indent=indent)


def table(pools: Sequence[Pool]) -> str:
    """One line a pool, then one line a replica."""
    rows = [_HEADER, *(_row(replica) for pool in pools for replica in pool.replicas)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for pool in pools:
        target = "?" if pool.target_num_replicas is None else pool.target_num_replicas
        lines.append(f"{pool.name}: target {target}, routable {pool.num_routable}{_trouble(pool)}")
        if pool.replicas:
            lines.append(_line(_HEADER, widths))
            lines += [_line(_row(replica), widths) for replica in pool.replicas]
        if more := pending(pool):
            lines.append(f"  {'; '.join(more)}")
    return "\n".join(lines) if lines else "no pools"


def duration(seconds: float) -> str:
    """`seconds` for people: `9s`, `4m05s`, `3h20m`, `2d03h`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _row(replica: Replica) -> tuple[str, ...]:
    counts = (replica.num_requests_running, replica.num_requests_waiting, replica.num_requests_in_flight)
    return (
        f"  {replica.replica_id}",
        replica.state if replica.reason is None else f"{replica.state} ({replica.reason})",
        *("-" if count is None else str(count) for count in counts),
        "-" if replica.kv_cache_usage is None else f"{replica.kv_cache_usage:.0%}",
        "-" if replica.uptime_s is None else duration(replica.uptime_s),
    )


def _trouble(pool: Pool) -> str:
    """What keeps a whole pool from serving as it should; empty when nothing does."""
    if pool.state in (None, "routable"):
        return ""
    return f", {pool.state}" if pool.reason is None else f", {pool.state} ({pool.reason})"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join([*left, *right])
