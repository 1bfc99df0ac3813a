# SPDX-License-Identifier: Apache-2.0
"""A Redis server for a test: Debian's `redis-server`, which `scripts/setup.sh` installs."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.stack import free_port, wait_until

PASSWORD = "open sesame"


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[int]:
    """Port of a server on 127.0.0.1 that asks for `PASSWORD` and keeps nothing on disk."""
    port = free_port()
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(
        ["redis-server", *arguments, "--requirepass", PASSWORD],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: redis_command(port, b"PING\r\n").startswith(b"-NOAUTH"), 10, "Redis answers")
        yield port
    finally:
        process.terminate()
        process.wait(10)


def redis_command(port: int, command: bytes) -> bytes:
    """The answer to one inline command; empty when nobody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(command)
            return connection.recv(65536)
    except OSError:
        return b""
