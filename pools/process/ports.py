# SPDX-License-Identifier: Apache-2.0
"""Ports that the kernel chooses."""

from __future__ import annotations

import socket


def free_port(host: str) -> int:
    """A TCP port of `host` that is free at the moment. The caller binds it moments later, and fails loudly if another
    process has taken it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])
