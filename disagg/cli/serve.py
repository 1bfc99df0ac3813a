# SPDX-License-Identifier: Apache-2.0
"""`disagg serve`: its options. What it does is in `disagg.cli.serving`, which needs more than the base install."""

from __future__ import annotations

import argparse
from pathlib import Path

from disagg.cli import connection, extras


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "serve",
        help="serve a config file on this machine until Ctrl-C",
        description="Check CONFIG, create the key files that it names when they are missing, run "
        "`serve run CONFIG`, wait until requests are answered, and print the URL. Ctrl-C drains and ends "
        "everything that was started; a second Ctrl-C does not wait for requests.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="Serve config file (YAML)")
    parser.add_argument(
        "--model",
        metavar="ID_OR_DIRECTORY",
        help="serve this model in place of the config's: a Hugging Face id, or the directory of a checkpoint. Clients "
        "name it by the id, or by the directory's last part",
    )
    parser.add_argument(
        "--log-file",
        type=Path,
        default=Path("build/serve.log"),
        metavar="FILE",
        help="where Ray's and the engines' output goes (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show that output here too")
    parser.add_argument(
        "--start-timeout-s",
        type=connection.seconds,
        default=1800.0,
        metavar="S",
        help="give up when no request is answered after this many seconds (default: 1800)",
    )
    parser.add_argument(
        "--max-start-failures",
        type=connection.count,
        default=3,
        metavar="N",
        help="give up when so many replicas have failed to start (default: 3)",
    )
    parser.add_argument(
        "--drain-s",
        type=connection.seconds_or_none,
        metavar="S",
        help="seconds that running requests get after Ctrl-C (default: the longest drain_timeout_s of the config)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C. 0 after a clean end, 1 when it cannot start, dies, or leaves something behind."""
    extras.require("serve", ("ray", "psutil"))
    from disagg.cli.serving import serve

    return serve(args)
