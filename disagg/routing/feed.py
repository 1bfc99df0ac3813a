# SPDX-License-Identifier: Apache-2.0
"""Where Serve's routers report replicas and the gateway of the same process listens. Thread-safe.

This module holds the one state that a process keeps at module level. Serve builds its routers itself, so the gateway
cannot hand them an object.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from disagg.routing.views import ReplicaInfo

logger = logging.getLogger(__name__)

Listener = Callable[[str, list[ReplicaInfo]], None]

_lock = threading.Lock()
_latest: dict[str, list[ReplicaInfo]] = {}
_listeners: list[Listener] = []
_told: set[str] = set()
"""Messages that are in the log already, about unknown fields and replicas that cannot be used."""
_MAX_TOLD = 1024


def report(pool: str, published: Mapping[str, Mapping[str, Any]]) -> None:
    """Publish a pool's list as Serve has it: replica id to what the replica published about itself.

    During a rolling update the list holds replicas of several versions. A replica whose data cannot be understood is
    logged and left out; the others are published all the same.
    """
    replicas: list[ReplicaInfo] = []
    for replica_id, metadata in published.items():
        for name in sorted(ReplicaInfo.unknown_fields(metadata)):
            _tell_once(logging.INFO, f"replicas publish {name!r}, which this version of the gateway does not know")
        try:
            replicas.append(ReplicaInfo.from_metadata(replica_id, metadata))
        except ValueError as exc:
            _tell_once(
                logging.ERROR,
                f"replica {replica_id} of pool {pool} is not used, for what it published cannot be understood: {exc}",
            )
    publish(pool, replicas)


def _tell_once(level: int, message: str) -> None:
    with _lock:
        told = message in _told
        if len(_told) >= _MAX_TOLD:
            _told.clear()
        _told.add(message)
    if not told:
        logger.log(level, message)


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
