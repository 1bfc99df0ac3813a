# SPDX-License-Identifier: Apache-2.0
"""What Serve's controller says of an application, and an end for its replicas that never had a place.

Serve asks a replica to shut down and waits `graceful_shutdown_timeout_s` for it to say so, also when Ray has not placed
the replica yet. A pool that was scaled far beyond its nodes would take minutes to come back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import ray

_NAMESPACE = "serve"


def controller() -> Any:
    """The handle of Serve's controller. Raises ValueError when there is none."""
    return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace=_NAMESPACE)


def details(app_name: str, *, timeout_s: float = 5.0) -> Mapping[str, Any]:
    """The deployments of an application, by name; empty when Serve has none of this name. Blocks.

    Raises:
        RayError: the controller did not answer.
        ValueError: there is no controller.
    """
    found = ray.get(controller().get_serve_instance_details.remote(), timeout=timeout_s)
    deployments: Mapping[str, Any] = found["applications"].get(app_name, {}).get("deployments", {})
    return deployments


def without_place(deployments: Mapping[str, Any], *, stopping: bool = False) -> list[str]:
    """Names of the actors of replicas that Ray has not placed. Pure.

    Args:
        deployments: as from `details`. Source: Ray Serve 2.60 `ReplicaDetails`.
        stopping: only of those that are to stop.
    """
    return [
        replica["actor_name"]
        for deployment in deployments.values()
        for replica in deployment["replicas"]
        if replica.get("node_id") is None and replica.get("actor_name")
        if not stopping or str(getattr(replica["state"], "value", replica["state"])) == "STOPPING"
    ]


def to_come(deployments: Mapping[str, Any]) -> bool:
    """Whether Serve still wants a replica that Ray has not placed. Pure."""
    return set(without_place(deployments)) > set(without_place(deployments, stopping=True))


def end(actor_names: Sequence[str]) -> int:
    """Kill actors of Serve's. Returns how many were there. Blocks briefly."""
    ended = 0
    for name in actor_names:
        with contextlib.suppress(ValueError):  # it has gone by itself
            ray.kill(ray.get_actor(name, namespace=_NAMESPACE))
            ended += 1
    return ended
