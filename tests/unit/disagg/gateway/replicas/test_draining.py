# SPDX-License-Identifier: Apache-2.0
"""Replicas that leave while requests run, over real sockets: nothing is cut, and the books are whole."""

from __future__ import annotations

import asyncio

from disagg.config import GatewayConfig
from disagg.gateway.replicas.membership import DECODE, PREFILL
from pools.engine.base import Receive, Scope, Send
from tests.support.gateway_stack import Replica, Reply, Stack, run, running_stack, until


class Held:
    """Holds the requests that reach an engine until it is told to let them through."""

    def __init__(self, replica: Replica) -> None:
        self.arrived = asyncio.Event()
        self.go = asyncio.Event()
        replica.engine.hook = self._hook

    async def _hook(self, scope: Scope, receive: Receive, send: Send) -> bool:
        if scope["method"] == "POST":
            self.arrived.set()
            await self.go.wait()
        return False


def leave(stack: Stack, replica: Replica) -> asyncio.Task[bool]:
    """As Serve does it: out of every gateway's list, then the drain."""
    stack.gateway.membership.replace(PREFILL, [r.info for r in stack.prefill if r is not replica])
    stack.gateway.membership.replace(DECODE, [r.info for r in stack.decode if r is not replica])
    return asyncio.create_task(replica.server.drain(10))


def test_a_leaving_decode_replica_waits_for_its_decode_leg() -> None:
    """It was chosen, its prefill leg runs: it does not stop before the decode leg has come and gone."""

    async def check() -> None:
        async with running_stack(num_decode=2) as stack:
            held = Held(stack.prefill[0])
            asking = asyncio.create_task(stack.complete())
            await held.arrived.wait()
            members = stack.gateway.membership.members(DECODE)
            chosen = next(m.info.replica_id for m in members if m.num_in_flight)
            replica = next(r for r in stack.decode if r.replica_id == chosen)
            draining = leave(stack, replica)
            await until(lambda: replica.server._draining)
            # A whole round of reads: the gateway has said that it is not done.
            for _ in range(2):
                seen = stack.gateway.feed._followed[replica.incarnation].heard_at
                await until(lambda: stack.gateway.feed._followed[replica.incarnation].heard_at > seen)  # noqa: B023
            assert not draining.done()
            held.go.set()
            reply = await asking
            assert (reply.status, reply.headers["x-disagg-decode"]) == (200, chosen)
            assert stack.metric("disagg_local_prefills_total", reason="decode_lost") == 0
            assert await draining
            # It is let go, so nobody sends it more.
            assert (await stack.complete()).headers["x-disagg-decode"] != chosen

    run(check())


async def _rendering(stack: Stack) -> tuple[asyncio.Task[Reply], asyncio.Event]:
    """A request that is being rendered until the event is set."""
    rendering, go = asyncio.Event(), asyncio.Event()

    async def before() -> None:
        rendering.set()
        await go.wait()

    stack.renderer.before = before
    asking = asyncio.create_task(stack.complete())
    await rendering.wait()
    return asking, go


def test_an_application_that_ends_finishes_what_it_has_accepted() -> None:
    """Every replica leaves while a request is still being rendered: it is answered, and all drains end."""

    async def check() -> None:
        async with running_stack() as stack:
            asking, go = await _rendering(stack)
            stack.gateway.membership.replace(PREFILL, [])
            stack.gateway.membership.replace(DECODE, [])
            drains = [asyncio.create_task(replica.server.drain(10)) for replica in stack.replicas]
            assert await drains[0]
            assert not drains[1].done()
            go.set()
            assert (await asking).status == 200
            assert await drains[1]

    run(check())


def test_an_application_that_ends_accepts_nothing_more() -> None:
    """Its last decode replica says that it drains: what was accepted goes there, nothing new does."""

    async def check() -> None:
        async with running_stack(config=GatewayConfig(watch_interval_s=0.02, prefill_alone_tokens=0)) as stack:
            asking, go = await _rendering(stack)
            (member,) = stack.gateway.membership.members(DECODE)
            draining = leave(stack, stack.decode[0])
            await until(lambda: member.draining)
            refused = await stack.complete()
            assert refused.status == 503 and int(refused.headers["retry-after"]) > 0
            assert (await stack.call("POST", "/tokenize", {"model": "tiny", "prompt": "a"})).status == 503
            go.set()
            assert (await asking).status == 200
            assert await draining

    run(check())


def test_a_stream_outlives_the_drain_of_its_replica_and_keeps_the_books() -> None:
    """A prefill replica leaves with its KV unread; it is read, and the ledger hears of it before the end."""

    async def check() -> None:
        async with running_stack() as stack:
            held = Held(stack.decode[0])
            asking = asyncio.create_task(stack.complete())
            await held.arrived.wait()
            prefill = stack.prefill[0]
            assert await leave(stack, prefill)
            assert prefill.engine.stats().kv_cache_usage > 0
            held.go.set()
            assert (await asking).status == 200
            await until(lambda: prefill.is_idle)
            assert await prefill.server.told(5)
            assert stack.gateway.ledger.totals["consumed"].count == 1 and not stack.gateway.ledger.num_open

    run(check())


def test_a_list_that_is_empty_for_a_moment_fails_no_request() -> None:
    """Serve's controller was killed and knows nothing yet; the replicas live, so requests go on to them."""

    async def check() -> None:
        async with running_stack() as stack:
            stack.gateway.membership.replace(PREFILL, [])
            stack.gateway.membership.replace(DECODE, [])
            # A whole round of reads, with nothing under way.
            followed = stack.gateway.feed._followed[stack.decode[0].incarnation]
            for _ in range(2):
                seen, poll = followed.heard_at, stack.decode[0].engine.events
                poll.append({"kind": "none", "at": 0.0})
                await until(lambda: followed.heard_at > seen)  # noqa: B023
            assert (await stack.complete()).status == 200
            stack.announce()
            await stack.warmed()
            assert (await stack.complete()).headers["x-disagg-prefill"] == "p0"

    run(check())
