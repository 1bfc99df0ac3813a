# SPDX-License-Identifier: Apache-2.0
"""`disagg handoffs`: what became of the KV of each request, as a table or as JSON."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from disagg.cli import connection

if TYPE_CHECKING:
    from disagg.sdk.types import HandoffRecord, Handoffs

_HEADER = (
    "PRODUCED",
    "HANDOFF",
    "REQUEST",
    "PREFILL",
    "DECODE",
    "OUTCOME",
    "TOKENS",
    "MIB",
    "LEASE",
    "REUSED",
    "REASON",
)
_NUM_LEFT = 6
_ENDS = ("consumed", "released", "rescued", "expired", "failed")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "handoffs",
        help="show what became of the KV that was handed off",
        description="Show the hand-offs of a gateway replica, newest first, and whether its books balance. Exit code 1 "
        "when they do not.",
    )
    connection.add_arguments(parser)
    parser.add_argument(
        "--outcome", metavar="WORD", help="only these: open, " + ", ".join(_ENDS) + ", stored or reused"
    )
    parser.add_argument(
        "--gateway", choices=("own", "other"), help="books of the replica that answers, or what it heard of all others"
    )
    parser.add_argument("--replica", metavar="ID", help="only those of this replica, on either side")
    parser.add_argument("--request-id", metavar="ID", help="only those of this request")
    parser.add_argument("--tenant", metavar="NAME", help="only those of requests with an API key of this tenant")
    parser.add_argument(
        "--since-s", type=connection.seconds, metavar="S", help="only those produced in the last S seconds"
    )
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="rows to print at most (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the records and the totals."""
    with connection.client(args) as client:
        found = client.handoffs(
            gateway=args.gateway,
            outcome=args.outcome,
            replica=args.replica,
            request_id=args.request_id,
            tenant=args.tenant,
            since=None if args.since_s is None else max(0.0, time.time() - args.since_s),
            limit=args.limit,
        )
    print(found.model_dump_json(indent=2) if args.json else "\n".join([*table(found.records), *totals(found)]))
    return 0 if found.balanced else 1


def table(records: Sequence[HandoffRecord]) -> list[str]:
    """A header and one line a record; nothing without records."""
    if not records:
        return []
    rows = [_HEADER, *(_row(record) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return [_line(row, widths) for row in rows]


def totals(found: Handoffs) -> list[str]:
    """The balance, then what was stored and loaded again."""
    count = {word: total.count for word, total in found.totals.items()}
    parts = [f"{word} {count.get(word, 0)}" for word in _ENDS]
    sign = "=" if found.balanced else "!="
    lines = [f"produced {count.get('produced', 0)} {sign} {' + '.join([*parts, f'open {found.num_open}'])}"]
    for word in ("produced", "stored", "reused"):
        if total := found.totals.get(word):
            lines.append(f"{word}: {total.count} hand-offs, {total.tokens} tokens, {_mib(total.bytes)} MiB")
    return lines


def _row(record: HandoffRecord) -> tuple[str, ...]:
    return (
        "-" if record.produced_at is None else time.strftime("%H:%M:%S", time.localtime(record.produced_at)),
        record.handoff_id,
        record.request_id or "-",
        record.prefill.replica_id or "-",
        (record.decode and record.decode.replica_id) or "-",
        record.outcome,
        str(record.tokens),
        _mib(record.bytes),
        "-" if record.lease_left_s is None else f"{record.lease_left_s:.1f}s",
        "-" if record.reused_at is None else str(record.reused_tokens),
        record.reason or "-",
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(row[:_NUM_LEFT], widths, strict=False)]
    right = [cell.rjust(width) for cell, width in zip(row[_NUM_LEFT:-1], widths[_NUM_LEFT:], strict=False)]
    return "  ".join([*left, *right, row[-1]])
