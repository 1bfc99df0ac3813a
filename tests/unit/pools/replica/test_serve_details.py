# SPDX-License-Identifier: Apache-2.0
"""Which replicas never had a place, by Serve's own details."""

from __future__ import annotations

from typing import Any

from pools.replica.serve_details import to_come, without_place


def replica(name: str, state: str, **fields: Any) -> dict[str, Any]:
    return {"actor_name": name, "state": state, **fields}


def test_replicas_without_a_place() -> None:
    """All of them, or those that are to stop; never one that a node has taken."""
    replicas = [
        *(replica("waits", "STARTING"), replica("goes", "STOPPING", node_id=None)),
        *(replica("starts", "STARTING", node_id="n"), replica("drains", "STOPPING", node_id="n")),
        {"state": "STARTING"},
    ]
    found = {"decode": {"replicas": replicas}, "prefill": {"replicas": []}}
    assert without_place(found) == ["waits", "goes"]
    assert without_place(found, stopping=True) == ["goes"]


def test_replicas_that_are_still_wanted() -> None:
    """One without a place that is not to stop: Serve would start another one if it ended."""
    waits, goes, starts = replica("w", "STARTING"), replica("g", "STOPPING"), replica("s", "STARTING", node_id="n")
    assert to_come({"decode": {"replicas": [waits, goes]}})
    assert not to_come({"decode": {"replicas": [goes, starts]}})
    assert not to_come({})
