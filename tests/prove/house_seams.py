# SPDX-License-Identifier: Apache-2.0
"""Line 6: routes state their keys, versions may mix, and a quarantined pool is told alike everywhere."""

from __future__ import annotations

from starlette.responses import Response

from disagg.gateway.front.edge import Route, RouteTable, UnstatedRouteError
from tests.prove.house_client import unknown_fields
from tests.prove.house_states import quarantined_pool
from tests.prove.report import Row


def doors_and_states() -> list[Row]:
    return [unstated_route(), *unknown_fields(), *quarantined_pool()]


def unstated_route() -> Row:
    """A table with one route too many makes no gateway."""

    async def handler() -> Response:
        return Response()

    try:
        RouteTable([Route("GET", "/v1/models", handler, "client"), Route("GET", "/backdoor", handler)])
    except UnstatedRouteError as exc:
        return Row(6, "a route that states no key", str(exc).split(";")[0], "fails the start by name", True)
    return Row(6, "a route that states no key", "is served", "fails the start by name", False)
