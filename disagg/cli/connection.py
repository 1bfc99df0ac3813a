# SPDX-License-Identifier: Apache-2.0
"""Options that say which server to talk to and with which key, shared by the commands that need one."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path

from disagg.errors import ConfigError
from disagg.sdk.client import DEFAULT_URL, Client

DEFAULT_KEY_FILE = Path(".cache/admin-key")
_YEAR_S = 366 * 86_400.0
KEY_VARIABLE = "DISAGG_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--url`, `--api-key-file`, `--ca-file` and `--timeout-s`."""
    parser.add_argument("--url", default=DEFAULT_URL, help="address of the gateway (default: %(default)s)")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds the admin key; without it ${KEY_VARIABLE}, else {DEFAULT_KEY_FILE} where that exists",
    )
    parser.add_argument(
        "--ca-file",
        type=Path,
        metavar="FILE",
        help="certificates (PEM) to trust, e.g. a self-signed one (default: $SSL_CERT_FILE, else the well-known ones)",
    )
    parser.add_argument(
        "--timeout-s", type=seconds, default=30.0, metavar="S", help="seconds one HTTP call may take (default: 30)"
    )


def seconds(text: str) -> float:
    """A time from the command line. Raises ArgumentTypeError unless it is above 0, and at most a year."""
    if (value := seconds_or_none(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def seconds_or_none(text: str) -> float:
    """The same, or 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _YEAR_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def count(text: str) -> int:
    """A number from the command line. Raises ArgumentTypeError unless it is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def client(args: argparse.Namespace) -> Client:
    """The client that the options describe. Raises `ConfigError` when the key or the URL cannot be used."""
    try:
        return Client(args.url, find_key(args.api_key_file, os.environ), timeout_s=args.timeout_s, ca_file=args.ca_file)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc


def find_key(file: Path | None, environ: Mapping[str, str], *, default: Path = DEFAULT_KEY_FILE) -> str | None:
    """The admin key: from `file`, else from the environment, else from `default` where it exists, else None."""
    if file is None:
        if key := environ.get(KEY_VARIABLE, "").strip():
            return key
        if not default.is_file():
            return None
        file = default
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise ConfigError(f"cannot read the admin key from {str(file)!r}: {reason}", path="api_key_file") from exc
    if not key:
        raise ConfigError(f"the file {str(file)!r} holds no key", path="api_key_file")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the file {str(file)!r} holds more than one line of printable ASCII", path="api_key_file")
    return key
