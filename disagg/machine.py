# SPDX-License-Identifier: Apache-2.0
"""What this machine has: cores, memory, free ports. The only part of the config check that asks the system."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """The host that engines with `platform: cpu` run on."""

    num_cpus: int
    memory_bytes: int
    """Memory this process may use: that of the host, or the control group's limit if it is lower."""
    port_trouble: Callable[[str, int], str | None]
    """Why nothing can listen on (host, port), or None when it is free."""


def this_machine() -> Machine:
    """The machine this runs on. Reads /proc and /sys; opens no socket until `port_trouble` is called."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return Machine(num_cpus=os.cpu_count() or 1, memory_bytes=memory, port_trouble=port_trouble)


def port_trouble(host: str, port: int) -> str | None:
    """Why nothing can listen on the port, or None when it is free. Binds for a moment."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        return exc.strerror or str(exc)
    return None
