# SPDX-License-Identifier: Apache-2.0
"""`disagg tiny-model`: write a model with random weights that is small enough for any machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from disagg.cli import extras
from disagg.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "tiny-model",
        help="write a tiny random model for trying things out",
        description="Write a tiny model with random weights and its tokenizer to DIR. It answers nonsense, fast.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="directory to write to; created when missing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the model."""
    extras.require("tiny-model", ("numpy", "tokenizers"))
    from disagg.tiny_model import write_tiny_model

    try:
        write_tiny_model(args.directory)
    except OSError as exc:
        raise ConfigError(f"cannot write to {str(args.directory)!r}: {exc.strerror or exc}") from exc
    print(f"wrote {args.directory}")
    return 0
