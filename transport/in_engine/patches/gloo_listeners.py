# SPDX-License-Identifier: Apache-2.0
"""Closes the ports that torch's Gloo process groups leave open in an engine's workers. Replaces nothing.

Each group listens for its members on a port of its own, on the node's address; a worker has about twenty such ports.
Once a group is made, all its members are connected and nobody needs the port. But Gloo goes on taking connections
there, and keeps those that send nothing for ever. When file descriptors run out, Gloo ends the process
(`gloo::EnforceNotMet` in its thread).

Our outer connector calls this in each worker. vLLM makes its groups when it finds the device, and makes the connector
later, when the model is loaded. A port is closed only when its group itself has written the port's address down for the
members. So no socket of another library or thread is ever closed. A group that connects at the first use
(`TORCH_GLOO_LAZY_INIT`) has written nothing down yet and keeps its port.

Source: PyTorch 2.13 `ProcessGroupGloo`. Its constructor ends with Gloo's `connectFullMesh`, which stores the addresses
of a rank's devices, each with its `sockaddr`, under `<device>/<rank>` in the group's store.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Iterable, Mapping

from transport.in_engine.patches.ports import ListeningSocket, close_sockets, listening

logger = logging.getLogger(__name__)

_ADDRESSES = "cpu//0/{rank}"
"""Key in a group's store of what Gloo tells the other ranks. The first part is torch's, the rest is Gloo's."""


def close_group_ports() -> int:
    """Close the ports of the Gloo groups that this process is a member of; the number of ports closed. Idempotent."""
    from torch.distributed import distributed_c10d

    published = []
    for group, (backend, store) in distributed_c10d._world.pg_map.items():
        key = _ADDRESSES.format(rank=group.rank())
        if "gloo" in backend and store.check([key]):
            published.append(store.get(key))
    ports = listening()
    closed = published_in(ports, published)
    close_sockets(closed)
    logger.info("closed %d of %d ports of %d process groups", len(closed), len(ports), len(published))
    return len(closed)


def published_in(ports: Mapping[int, ListeningSocket], published: Iterable[bytes]) -> set[int]:
    """Descriptors of the ports whose address is in what some group has published. Pure."""
    texts = list(published)
    return {fd for fd, listener in ports.items() if any(_sockaddr(listener) in text for text in texts)}


def _sockaddr(listener: ListeningSocket) -> bytes:
    """The head of the kernel's `sockaddr_in` or `sockaddr_in6` for this address."""
    flow = b"\0\0\0\0" if listener.family == socket.AF_INET6 else b""
    host = socket.inet_pton(listener.family, listener.host)
    return struct.pack("=H", listener.family) + struct.pack("!H", listener.port) + flow + host
