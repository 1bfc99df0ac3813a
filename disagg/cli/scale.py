# SPDX-License-Identifier: Apache-2.0
"""`disagg scale`: set a pool's size, and wait until it has it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from disagg.cli import connection
from disagg.sdk.messages import MAX_NUM_REPLICAS, missing

if TYPE_CHECKING:
    from disagg.sdk.types import Pool


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "scale",
        help="set the number of replicas of a pool",
        description="Set the number of replicas of a pool and wait until it has them. The size holds until the "
        "application is redeployed; it is not written to the config file.",
    )
    parser.add_argument("pool", metavar="POOL", help="prefill or decode")
    parser.add_argument("num_replicas", metavar="N", type=_size, help=f"replicas wanted, 1 to {MAX_NUM_REPLICAS}")
    connection.add_arguments(parser)
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="wait until it is done (default)"
    )
    parser.add_argument(
        "--wait-s",
        type=connection.seconds_or_none,
        default=300.0,
        metavar="S",
        help="seconds to wait at most (default: 300)",
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask for the size; wait for it unless told not to."""
    with connection.client(args) as client:
        operation = client.pool(args.pool).scale(args.num_replicas)
        pool: Pool | None = None
        if args.wait:
            pool = operation.wait(args.wait_s, on_progress=None if args.json else _Progress(args.num_replicas))
        if args.json:
            outcome = {"name": args.pool, "target_num_replicas": args.num_replicas, "elapsed_s": operation.elapsed_s}
            print(json.dumps(outcome | ({} if pool is None else {"pool": pool.model_dump(mode="json")}), indent=2))
        elif pool is None:
            print(f"{args.pool}: {args.num_replicas} replicas asked for; see `disagg status`")
        else:
            print(f"{args.pool}: {pool.num_routable} replicas ready after {operation.elapsed_s:.1f} s")
    return 0


class _Progress:
    """Prints what is missing, to stderr, each time that it changes."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._last = ""

    def __call__(self, pool: Pool) -> None:
        text = missing(pool, self._num_replicas)
        if text not in (self._last, "nothing"):
            print(f"{pool.name}: {text}", file=sys.stderr, flush=True)
        self._last = text


def _size(text: str) -> int:
    try:
        size = int(text)
    except ValueError:
        size = 0
    if not 1 <= size <= MAX_NUM_REPLICAS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_NUM_REPLICAS}")
    return size
