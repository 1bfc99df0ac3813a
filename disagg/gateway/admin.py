# SPDX-License-Identifier: Apache-2.0
"""The admin API: sizes, states and load of the pools, scaling, and the ledger of hand-offs.

A `Scaler` scales the pools; `disagg.gateway.deployment` has one that asks Serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from disagg.errors import InvalidRequestError, NotFoundError
from disagg.gateway.ledger import query as ledger_query
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.replicas.membership import POOLS, Member, Membership
from disagg.gateway.serve_plan import NOTHING_KNOWN, PoolPlan
from pools.client.messages import ReplicaStats
from pools.errors import ReplicaLostError, UnusableAnswerError

MAX_REPLICAS = 1024


class Scaler(Protocol):
    """Sets and tells the target size of a pool."""

    async def plans(self) -> Mapping[str, PoolPlan]:
        """What is planned for each pool. A pool of which nothing is known is left out."""
        ...

    async def scale(self, pool: str, num_replicas: int) -> None:
        """Raises ConflictError when the application does not allow scaling from outside."""
        ...


class Admin:
    """Answers of the admin API as JSON-able values."""

    def __init__(self, membership: Membership, scaler: Scaler, ledger: Ledger, foreign: Ledger) -> None:
        """`foreign`: the books of other gateways' hand-offs."""
        self._membership = membership
        self._scaler = scaler
        self._ledger = ledger
        self._foreign = foreign

    async def pools(self) -> dict[str, Any]:
        """Sizes, states and load. Asks each replica for its load first, so that the states show who is unreachable."""
        plans = await self._scaler.plans()
        members = {name: self._membership.members(name) for name in POOLS}
        asked = await asyncio.gather(*(self._stats(member) for name in POOLS for member in members[name]))
        stats = iter(asked)
        return {
            "pools": [
                self._pool(name, plans.get(name, NOTHING_KNOWN), [(member, next(stats)) for member in members[name]])
                for name in POOLS
            ]
        }

    def handoffs(self, query: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """The books of this gateway replica, or of all others, and the records that `query` asks for."""
        chosen = ledger_query.parse(query)
        return ledger_query.listed(self._foreign if chosen.gateway == "other" else self._ledger, chosen)

    def handoff(self, handoff_id: str) -> dict[str, Any]:
        record = self._ledger.find(handoff_id) or self._foreign.find(handoff_id)
        if record is None or record.produced_at is None:
            raise NotFoundError(
                f"this gateway replica remembers no hand-off {handoff_id!r}; raise gateway.ledger_records to keep more"
            )
        return ledger_query.as_json(record)

    async def scale(self, pool: str, body: dict[str, Any]) -> dict[str, Any]:
        if pool not in POOLS:
            raise NotFoundError(f"there is no pool {pool!r}; the pools are {' and '.join(POOLS)}", param="pool")
        unknown = sorted(body.keys() - {"num_replicas"})
        if unknown:
            raise InvalidRequestError(f"unknown field {unknown[0]!r}; only num_replicas is known", param=unknown[0])
        wanted = body.get("num_replicas")
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= MAX_REPLICAS:
            raise InvalidRequestError(
                f"num_replicas must be a whole number from 1 to {MAX_REPLICAS}", param="num_replicas"
            )
        await self._scaler.scale(pool, wanted)
        return {"name": pool, "target_num_replicas": wanted}

    def _pool(self, name: str, plan: PoolPlan, members: Sequence[tuple[Member, ReplicaStats | None]]) -> dict[str, Any]:
        standing = self._membership.pool_standing(name)
        return {
            "name": name,
            **asdict(plan),
            "num_routable": self._membership.num_routable(name),
            "state": standing.state,
            "reason": standing.reason,
            "replicas": [self._replica(member, stats) for member, stats in members],
        }

    async def _stats(self, member: Member) -> ReplicaStats | None:
        """The load that a replica reports of itself; None when it reports nothing that can be used."""
        try:
            return await member.client.stats()
        except UnusableAnswerError:
            return None
        except ReplicaLostError as exc:
            if exc.unreachable:
                self._membership.mark_unreachable(member)
            return None

    def _replica(self, member: Member, stats: ReplicaStats | None) -> dict[str, Any]:
        standing = self._membership.standing(member)
        return {
            "replica_id": member.info.replica_id,
            "engine_id": member.info.engine_id,
            "incarnation": member.info.incarnation,
            "state": standing.state,
            "reason": standing.reason,
            "url": member.info.url,
            "pid": stats and stats.pid,
            "warm_peers": sorted(member.warm_peers),
            "lmcache_http_url": member.info.lmcache_http_url,
            "num_requests_running": stats and stats.num_requests_running,
            "num_requests_waiting": stats and stats.num_requests_waiting,
            "num_requests_in_flight": stats and stats.num_requests_in_flight,
            "kv_cache_usage": stats and stats.kv_cache_usage,
            "uptime_s": stats and stats.uptime_s,
        }
