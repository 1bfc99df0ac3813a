# SPDX-License-Identifier: Apache-2.0
"""Where Serve's routers report replicas and the gateway of the same process listens. Thread-safe.

The one piece of state of a process that is shared by module: Serve builds its routers itself, so that nothing can be
handed to them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from disagg.routing.views import ReplicaInfo

Listener = Callable[[str, list[ReplicaInfo]], None]

_lock = threading.Lock()
_latest: dict[str, list[ReplicaInfo]] = {}
_listeners: list[Listener] = []


def publish(pool: str, replicas: list[ReplicaInfo]) -> None:
    """Take Serve's list for one pool and pass it on, in the calling thread."""
    with _lock:
        _latest[pool] = replicas
        listeners = list(_listeners)
    for listener in listeners:
        listener(pool, replicas)


def subscribe(listener: Listener) -> None:
    """Call `listener` for each list from here on, and once for each that is already known."""
    with _lock:
        _listeners.append(listener)
        known = dict(_latest)
    for pool, replicas in known.items():
        listener(pool, replicas)
