# SPDX-License-Identifier: Apache-2.0
"""What Serve has in hand with a pool, from its own details."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve.schema import ReplicaDetails, ReplicaState

from disagg.gateway.serve_plan import PoolPlan, plan_of

FREE = {"CPU": 0.5, "memory": 1e9}
WARNING = (
    "Deployment 'decode' in application 'disagg' has 3 replicas that have taken more than 30s to be scheduled. This "
    'may be due.\nResources required for each replica: [{"CPU": 8.0}], total resources available: {}. '
    "Use `ray status` for more details."
)
FAILURE = (
    "A replica failed to start with exception. Retrying 2 more time(s). Error:\n\x1b[36mray::ServeReplica\x1b[39m\n"
    "ValueError: deep down\n\nThe above exception was the direct cause of the following exception:\n\n"
    "pools.errors.EngineStartError: decode replica ab1 did not start: ValueError: no such dtype\n"
)
NO_DTYPE = "the last one did not start: ValueError: no such dtype"


def replica(state: str, node_id: str | None = "n") -> dict[str, Any]:
    details = ReplicaDetails(replica_id="r", state=ReplicaState(state), start_time_s=0.0, node_id=node_id)
    return dict(details.model_dump())


def deployment(
    *replicas: dict[str, Any], message: str = "", status: str = "UPDATING", **needs: float
) -> dict[str, Any]:
    return {
        "status": status,
        "message": message,
        "target_num_replicas": 4,
        "required_resources": needs,
        "replicas": list(replicas),
    }


def test_replicas_that_come_and_go() -> None:
    """Those that are up are not counted; those that no node has room for are counted apart."""
    states = [
        *(replica("RUNNING"), replica("STARTING"), replica("STARTING", None), replica("RECOVERING")),
        *(replica("UPDATING"), replica("STOPPING"), replica("STOPPING", None)),
    ]
    assert plan_of(deployment(*states), FREE) == PoolPlan(4, 4, 0, 2, None)
    why = "each needs 1 CPU, free in the cluster is 0.5 CPU"
    assert plan_of(deployment(*states, CPU=1), FREE) == PoolPlan(4, 3, 1, 2, why)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (deployment(message=FAILURE), NO_DTYPE),
        (
            deployment(replica("STARTING", None), CPU=2.0, GPU=1),
            "each needs 2 CPU, 1 GPU, free in the cluster is 0.5 CPU, 0 GPU",
        ),
        (deployment(replica("STARTING", None), CPU=0.25), None),
        (
            deployment(replica("STARTING", None), CPU=0.25, message=WARNING),
            "each needs 8 CPU, free in the cluster is 0.5 CPU",
        ),
        (deployment(replica("STARTING"), message=WARNING), None),
        (deployment(replica("RUNNING"), message=FAILURE, status="HEALTHY"), None),
        (
            deployment(replica("STARTING"), message=FAILURE, status="HEALTHY"),
            NO_DTYPE,
        ),
    ],
    ids=["failed", "no room", "room", "Serve says so", "has its place", "well again", "one of them fails"],
)
def test_why_replicas_are_not_up(found: dict[str, Any], reason: str | None) -> None:
    """What kept the last one from starting, else what no node has free; nothing of the past."""
    assert plan_of(found, FREE).pending_reason == reason


def test_a_place_that_is_not_found_though_there_is_room() -> None:
    """No node has all of it, or the process comes slowly: told once Serve has waited, and not counted as for ever."""
    found = deployment(replica("STARTING", None), CPU=0.25, message=WARNING)
    why = "each needs 8 CPU, free in the cluster is 9 CPU"
    assert plan_of(found, {"CPU": 9.0}) == PoolPlan(4, 1, 0, 0, why)
