# SPDX-License-Identifier: Apache-2.0
"""`disagg check`: validate a config file without starting anything."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "check",
        help="validate a config file",
        description="List every problem of a Serve config file and show what it amounts to. Starts nothing.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="Serve config file (YAML)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--update",
        action="store_true",
        help="the application runs already and is to be updated: its own ports are in use",
    )
    parser.add_argument(
        "--plan",
        action=argparse.BooleanOptionalAction,
        help="show what will run (default: when there is no error)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when the file can be served, else 1."""
    from disagg.advice.check import check_file

    report = check_file(args.config, update=args.update)
    print(json.dumps(report.as_dict(), indent=2) if args.json else report.render(plan=args.plan))
    return 0 if report.ok else 1
