# SPDX-License-Identifier: Apache-2.0
"""What Serve has in hand with one pool beside the replicas that are up: how many come, how many go, what is wrong.

Pure. `disagg.gateway.deployment` asks Serve's controller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pools.replica.unplaced import Unplaced

_STARTING = ("STARTING", "RECOVERING", "UPDATING")
_NOT_STARTED = re.compile(r"EngineStartError: \w+ replica \S+ did not start: (.+)")


@dataclass(frozen=True)
class PoolPlan:
    """Fields are None where Serve did not tell."""

    target_num_replicas: int | None = None
    num_starting: int | None = None
    """Replicas that are not up yet."""
    num_unplaced: int | None = None
    """Replicas for which no node has room."""
    num_stopping: int | None = None
    """Replicas that finish what they carry, or end."""
    pending_reason: str | None = None
    """Why replicas are not up, in words: what kept the last one from starting, or what no node has free."""


NOTHING_KNOWN = PoolPlan()


def plan_of(deployment: Mapping[str, Any], free: Mapping[str, float]) -> PoolPlan:
    """The plan for one pool.

    Args:
        deployment: as in Serve's instance details. Source: Ray Serve 2.60 `DeploymentDetails`.
        free: what the whole cluster has free.
    """
    states = [(_name(replica["state"]), replica.get("node_id") is not None) for replica in deployment["replicas"]]
    num_coming = sum(state in _STARTING for state, _ in states)
    unplaced = _unplaced(deployment, free)
    num_without = sum(state in _STARTING and not placed for state, placed in states)
    # While there is room, those that have no place yet may be about to get one.
    num_unplaced = num_without if unplaced is not None and unplaced.lacks else 0
    reason = unplaced.why if unplaced is not None and num_without else None
    num_starting = num_coming - num_unplaced
    # Serve keeps its last message for as long as the deployment is well.
    is_whole = _name(deployment["status"]) == "HEALTHY" and not num_coming
    return PoolPlan(
        target_num_replicas=deployment["target_num_replicas"],
        num_starting=num_starting,
        num_unplaced=num_unplaced,
        num_stopping=sum(state == "STOPPING" for state, _ in states),
        pending_reason=None if is_whole else _failure(deployment) or reason,
    )


def _failure(deployment: Mapping[str, Any]) -> str | None:
    """What kept the last replica from starting, if Serve tells of one."""
    failed = _NOT_STARTED.search(str(deployment.get("message") or ""))
    return None if failed is None else f"the last one did not start: {failed[1]}"


def _unplaced(deployment: Mapping[str, Any], free: Mapping[str, float]) -> Unplaced | None:
    """What one replica more needs, where the cluster has too little of it or Serve has looked in vain for a while."""
    required = {name: float(amount) for name, amount in (deployment.get("required_resources") or {}).items()}
    told = Unplaced.in_line(str(deployment.get("message") or "").replace("\n", " "))
    wanted = Unplaced(required, {}).beside(free)
    if wanted.lacks or told is None:
        return wanted if wanted.lacks else None
    return told.beside(free)


def _name(state: object) -> str:
    return str(getattr(state, "value", state))
