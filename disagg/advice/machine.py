# SPDX-License-Identifier: Apache-2.0
"""What this machine has: cores, memory, ports, directories, packages.

The only part of the config check that asks the system.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_GPUS = Path("/proc/driver/nvidia/gpus")


def is_installed(module: str) -> bool:
    """Whether `package` or `package.module` is there. Imports nothing, not even the package."""
    package, _, inner = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not inner:
        return spec is not None
    return any(any(Path(place).glob(f"{inner}*")) for place in spec.submodule_search_locations or ())


def directory_trouble(path: str) -> str | None:
    """Why files cannot be written to the directory, which may not exist yet, or None. Creates nothing."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{str(place)!r} is not a directory"
    return None if os.access(place, os.W_OK | os.X_OK) else f"no permission to write to {str(place)!r}"


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


@dataclass(frozen=True)
class Machine:
    """The host that replicas run on."""

    num_cpus: int
    memory_bytes: int
    """Memory this process may use: that of the host, or the control group's limit if it is lower."""
    port_trouble: Callable[[str, int], str | None]
    """Why nothing can listen on (host, port), or None when it is free."""
    shm_bytes: int | None = None
    """Size of /dev/shm; None where there is no /dev/shm, which is not checked then."""
    num_gpus: int = 0
    """NVIDIA GPUs; 0 on a machine that only checks configs for others."""
    directory_trouble: Callable[[str], str | None] = directory_trouble
    """Why files cannot be written to a directory, or None."""


def this_machine() -> Machine:
    """The machine this runs on. Reads /proc and /sys; opens no socket until `port_trouble` is called."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    shm_bytes = None
    with contextlib.suppress(OSError):
        # The size, not what is free: the application that is being replaced may hold the rest.
        status = os.statvfs(SHARED_MEMORY)
        shm_bytes = status.f_blocks * status.f_frsize
    num_gpus = 0
    with contextlib.suppress(OSError):
        num_gpus = sum(1 for _ in _GPUS.iterdir())
    return Machine(
        num_cpus=os.cpu_count() or 1,
        memory_bytes=memory,
        port_trouble=port_trouble,
        shm_bytes=shm_bytes,
        num_gpus=num_gpus,
    )
