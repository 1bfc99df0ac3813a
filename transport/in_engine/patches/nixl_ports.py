# SPDX-License-Identifier: Apache-2.0
"""Closes the ports of NIXL's UCX threads, to which nobody connects.

An agent with `num_threads` (4 by default in vLLM) has a UCX worker for each of them beside the one that peers talk to,
and each listens on TCP at every address of the node. Peers learn the ports of that one worker alone. The others take
connections all the same, but look at them only while they transfer: whatever a port scanner opens there keeps its file
descriptor for good, and with the last one UCX ends all its ports, the one that peers need included.

Source: NIXL 1.5 `ucx_backend.cpp`, where `getConnInfo` is the address of the first worker; UCX 1.2x `tcp_cm.c`, whose
worker address has the port in network byte order.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Mapping

from transport.in_engine.patches.gloo_listeners import close_sockets, listening

logger = logging.getLogger(__name__)


def close_unnamed(before: set[int], metadata: bytes) -> int:
    """Close what listens since `before` and is not named in the agent's `metadata`; the number of ports closed.

    Args:
        before: file descriptors that listened before the agent was made.
        metadata: what peers are given.
    """
    unnamed = without_name(_ports(listening() - before), metadata)
    close_sockets(unnamed)
    return len(unnamed)


def without_name(ports: Mapping[int, int], metadata: bytes) -> set[int]:
    """Descriptors of the ports whose number is nowhere in `metadata`; none when no port is named at all. Pure.

    Args:
        ports: port by file descriptor.
    """
    named = {descriptor for descriptor, port in ports.items() if struct.pack(">H", port) in metadata}
    if not named:
        if ports:
            logger.warning("NIXL's metadata name none of its %d ports: all are left open", len(ports))
        return set()
    return set(ports) - named


def _ports(descriptors: set[int]) -> dict[int, int]:
    found = {}
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            found[descriptor] = sock.getsockname()[1]
    return found
