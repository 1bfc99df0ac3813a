# SPDX-License-Identifier: Apache-2.0
"""Sockets of this process that listen on TCP, and how to close a socket that another library owns. Linux only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ListeningSocket:
    """One listening socket."""

    family: int
    """`AF_INET` or `AF_INET6`."""
    host: str
    port: int
    made_as: tuple[int, int, int]
    """Its descriptor flags, status flags and `SO_REUSEADDR`. Sockets of one library agree in them. Sockets of Python
    and ZMQ never agree with sockets of UCX: only Python and ZMQ have theirs closed on `exec`."""


def listening() -> dict[int, ListeningSocket]:
    """Every TCP socket on which this process listens, by file descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        # Not a socket, or closed by another thread since it was listed.
        with contextlib.suppress(OSError):
            if (listener := _listener(int(name))) is not None:
                found[int(name)] = listener
    return found


def _listener(descriptor: int) -> ListeningSocket | None:
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            return None
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        made_as = (
            fcntl.fcntl(descriptor, fcntl.F_GETFD),
            fcntl.fcntl(descriptor, fcntl.F_GETFL),
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR),
        )
        host, port = sock.getsockname()[:2]
        return ListeningSocket(sock.family, host, port, made_as)


def close_sockets(descriptors: Iterable[int]) -> None:
    """Close the sockets, but put /dev/null under their descriptor numbers: their owners close the numbers later."""
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for descriptor in descriptors:
            os.dup2(nothing, descriptor, inheritable=False)
    finally:
        os.close(nothing)
