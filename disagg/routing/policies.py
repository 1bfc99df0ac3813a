# SPDX-License-Identifier: Apache-2.0
"""The routing policies by the names that the configuration has for them."""

from __future__ import annotations

from typing import assert_never

from disagg.config import PolicyName
from disagg.routing.least_loaded import LeastLoaded
from disagg.routing.policy import Policy
from disagg.routing.round_robin import RoundRobin


def policy_for(name: PolicyName) -> Policy:
    """The policy called `name`."""
    match name:
        case "least_loaded":
            return LeastLoaded()
        case "round_robin":
            return RoundRobin()
        case _:
            assert_never(name)
