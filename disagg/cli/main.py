# SPDX-License-Identifier: Apache-2.0
"""The `disagg` command: reads the command line, runs one sub-command, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from disagg import __version__
from disagg.cli import check, handoffs, scale, serve, status, tiny_model
from disagg.errors import DisaggError

_EPILOG = "exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default) and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except DisaggError as exc:
        print(f"disagg: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader left, as `head` does. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as exc:
        if args.traceback:
            raise
        print(
            f"disagg: unexpected {type(exc).__name__}: {_line(exc)} (disagg --traceback shows where)", file=sys.stderr
        )
        return 1


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:500] or "without a message"


def build_parser() -> argparse.ArgumentParser:
    """The parser of every sub-command."""
    parser = argparse.ArgumentParser(
        prog="disagg", description="Serve a model with separate prefill and decode pools.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"disagg {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (serve, status, scale, handoffs, check, tiny_model):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
