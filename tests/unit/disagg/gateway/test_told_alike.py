# SPDX-License-Identifier: Apache-2.0
"""The state of the pools as `/health`, the admin API, the SDK, `disagg status` and the gauges tell it: alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from disagg.cli.status import table
from disagg.config import AdminConfig, GatewayConfig
from disagg.errors import ScaleTimeoutError
from disagg.gateway.replicas.membership import Pair
from disagg.sdk.client import AsyncClient
from pools.health.health import EngineHealth
from tests.support.gateway_stack import Stack, running_stack, until

HANGS = EngineHealth(state="suspect", reason="hang", since_s=1.0)


@pytest.fixture
def config(tmp_path: Path) -> GatewayConfig:
    key_file = tmp_path / "key"
    key_file.write_text("secret")
    return GatewayConfig(watch_interval_s=0.02, admin=AdminConfig(key_file=str(key_file)))


@dataclass
class Told:
    """One moment, as everybody tells it."""

    health_status: int
    health: dict[str, Any]
    admin: dict[str, dict[str, Any]]
    sdk: dict[str, Any]
    sdk_health: Any
    lines: list[str]

    def check(self, stack: Stack) -> None:
        """Fails where two differ."""
        for name, pool in self.admin.items():
            state = {"state": pool["state"], "reason": pool["reason"]}
            assert self.health["states"][name] == state == self.sdk_health.states[name].model_dump()
            assert (self.sdk[name].state, self.sdk[name].reason) == (pool["state"], pool["reason"])
            assert self.health["pools"][name] == pool["num_routable"] == self.sdk[name].num_routable
            assert stack.metric("disagg_replicas", pool=name, state="routable") == pool["num_routable"]
            states = [replica["state"] for replica in pool["replicas"]]
            assert stack.metric("disagg_replicas", pool=name, state="quarantined") == states.count("quarantined")
            assert pool["num_routable"] == sum(state in ("routable", "slow") for state in states)
            words = "" if pool["state"] == "routable" else f", {pool['state']}"
            words += f" ({pool['reason']})" if pool["reason"] else ""
            assert f"{name}: target ?, routable {pool['num_routable']}{words}" in self.lines


async def told(stack: Stack) -> Told:
    health = await stack.call("GET", "/health")
    admin = await stack.call("GET", "/admin/v1/pools", None, [("authorization", "Bearer secret")])
    async with AsyncClient(stack.url, "secret") as client:
        pools = await client.pools()
        sdk_health = await client.health()
    stack.gateway.metrics.render()
    return Told(
        health.status,
        health.json(),
        {pool["name"]: pool for pool in admin.json()["pools"]},
        {pool.name: pool for pool in pools},
        sdk_health,
        table(pools).splitlines(),
    )


def member(stack: Stack, replica_id: str) -> Any:
    members = [m for pool in ("prefill", "decode") for m in stack.gateway.membership.members(pool)]
    return next(m for m in members if m.info.replica_id == replica_id)


def hang(stack: Stack) -> Callable[[], bool]:
    """Every prefill engine hangs."""
    for replica in stack.prefill:
        replica.health = lambda: HANGS
    return lambda: all(m.quarantined for m in stack.gateway.membership.members("prefill"))


async def test_a_quarantined_prefill_pool(config: GatewayConfig) -> None:
    """It is quarantined and says why; decode replicas serve alone and are routable."""
    async with running_stack(num_prefill=2, num_decode=2, config=config) as stack:
        await until(hang(stack))
        found = await told(stack)
        found.check(stack)
        assert (found.health_status, found.health["status"]) == (200, "degraded")
        assert found.health["reason"] == "the prefill pool is quarantined (hang); decode replicas serve alone"
        assert (found.admin["prefill"]["state"], found.admin["prefill"]["reason"]) == ("quarantined", "hang")
        assert [r["state"] for r in found.admin["decode"]["replicas"]] == ["routable"] * 2
        assert "prefill: target ?, routable 0, quarantined (hang)" in found.lines
        assert "decode: target ?, routable 2" in found.lines
        assert found.sdk_health.serves and not found.sdk_health.ok
        assert (await stack.complete()).headers["x-disagg-prefill"] == "local"


async def test_waiting_for_a_size_beside_a_quarantined_pool(config: GatewayConfig) -> None:
    """The decode pool has its size although nobody can hand over; a wait for the prefill pool says what keeps it."""
    async with running_stack(num_prefill=1, num_decode=2, config=config) as stack:
        await until(hang(stack))
        async with AsyncClient(stack.url, "secret") as client:
            pool = await (await client.pool("decode").scale(2)).wait(timeout_s=5, poll_s=0.01)
            assert pool.num_routable == 2
            with pytest.raises(ScaleTimeoutError, match=r"0 of 1 are routable, 1 quarantined \(hang\)"):
                await (await client.pool("prefill").scale(1)).wait(timeout_s=0.1, poll_s=0.01)


@pytest.mark.parametrize("what", ["unreachable", "draining", "crash_loop", "empty", "slow", "warming"])
async def test_other_states_of_the_prefill_pool(what: str, config: GatewayConfig) -> None:
    """Whatever keeps prefill replicas from serving, it is told alike, and `ok` only with a pair that serves."""
    if what == "slow":
        # The next answer about its engine would end that.
        config = config.model_copy(update={"watch_interval_s": 60.0})
    async with running_stack(num_prefill=1, num_decode=1, config=config) as stack:
        p0 = member(stack, "p0")
        if what == "unreachable":
            stack.prefill[0].kill()
            await until(lambda: not p0.reachable)
        elif what == "draining":
            stack.prefill[0].health = lambda: EngineHealth(state="draining")
            await until(lambda: p0.draining)
        elif what == "crash_loop":
            stack.gateway.membership.put_on_probation(p0)
        elif what == "slow":
            p0.slow = True
        elif what == "empty":
            stack.gateway.membership.replace("prefill", [])
        else:
            for engine in (stack.prefill[0].engine, stack.decode[0].engine):
                engine.probe = failing  # type: ignore[method-assign]
            stack.gateway.membership.mark_cold(Pair(p0, member(stack, "d0")))
        found = await told(stack)
        found.check(stack)
        expected = {"crash_loop": ("warming", "crash_loop")}.get(what, (what, None))
        assert (found.admin["prefill"]["state"], found.admin["prefill"]["reason"]) == expected
        assert found.health["status"] == ("ok" if what == "slow" else "degraded")
        assert (await stack.complete()).status == 200


async def failing(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("not yet")


@pytest.mark.parametrize("alone", [True, False], ids=["prefill alone", "nobody"])
async def test_without_a_decode_pool(config: GatewayConfig, alone: bool) -> None:
    """Prefill takes over, or nobody takes new requests where it may not, and everybody says so."""
    if not alone:
        config = config.model_copy(update={"prefill_alone_tokens": 0})
    async with running_stack(num_prefill=1, num_decode=1, config=config) as stack:
        stack.gateway.membership.replace("decode", [])
        stack.gateway.membership.let_go(stack.decode[0].incarnation, carrying=False)
        found = await told(stack)
        found.check(stack)
        words = "the decode pool is empty" + ("; prefill replicas serve alone" if alone else "")
        status = (200, "degraded") if alone else (503, "unavailable")
        assert (found.health_status, found.health["status"], found.health["reason"]) == (*status, words)
        assert found.sdk_health.serves is alone
        assert (await stack.complete()).status == (200 if alone else 503)
