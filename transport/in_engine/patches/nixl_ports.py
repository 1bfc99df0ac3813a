# SPDX-License-Identifier: Apache-2.0
"""Closes the ports of NIXL's UCX threads, to which nobody connects. Replaces nothing.

A NIXL agent with `num_threads` (4 by default in vLLM) has a UCX worker for each thread, beside the worker that peers
talk to. Each UCX worker listens on TCP at every address of the node, but peers learn only the ports of that one worker.
The other workers take connections all the same, and look at them only while they transfer. So a connection of a port
scanner keeps its file descriptor for good. When no descriptor is left, UCX ends all its ports, also the one that peers
need.

A port is closed only when it was opened while our NIXL worker was made, and in the way in which UCX opens ports. Ports
that another thread opens in the meantime through Python or ZMQ are left alone.

Source: NIXL 1.5 `ucx_backend.cpp`, where `getConnInfo` is the address of the first worker; UCX 1.2x `tcp_cm.c`, whose
worker address has the port in network byte order.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Collection, Mapping

from transport.in_engine.patches.ports import ListeningSocket, close_sockets, listening

logger = logging.getLogger(__name__)


def close_unnamed(before: Collection[int], metadata: bytes) -> int:
    """Close UCX's ports that listen since `before` and are not named in the agent's `metadata`; how many were closed.

    Args:
        before: file descriptors that listened before the agent was made.
        metadata: what peers are given.
    """
    unnamed = without_name({fd: port for fd, port in listening().items() if fd not in before}, metadata)
    close_sockets(unnamed)
    return len(unnamed)


def without_name(ports: Mapping[int, ListeningSocket], metadata: bytes) -> set[int]:
    """Descriptors of the ports that `metadata` does not name, but that were made as a port that it names. Pure.

    Empty when `metadata` names no port at all: another version may write its addresses in another way.
    """
    named = {fd for fd, listener in ports.items() if struct.pack(">H", listener.port) in metadata}
    if ports and not named:
        logger.warning("NIXL's metadata name none of its %d ports: all are left open", len(ports))
    made_as = {ports[fd].made_as for fd in named}
    return {fd for fd, listener in ports.items() if fd not in named and listener.made_as in made_as}
