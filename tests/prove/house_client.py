# SPDX-License-Identifier: Apache-2.0
"""Line 6, in part: replicas of several versions under one gateway, as during a rolling update."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from disagg.gateway.replicas.membership import POOLS
from disagg.routing import feed
from pools.engine.base import Message, Receive, Scope, Send
from pools.replica.server import EngineServer
from tests.prove.report import Row
from tests.support.gateway_stack import Replica, Stack, run, running_stack, until

LATER = {"colour": "blue", "limits": {"max_num_seqs": 8}}
"""What replicas of a later version publish, and put into their answers to the gateway."""
NUM_REQUESTS = 20


def unknown_fields() -> list[Row]:
    """Two replicas a pool over real sockets: one of this version, one whose every word has fields it does not know."""
    return run(_unknown_fields())


async def _unknown_fields() -> list[Row]:
    async with running_stack(num_prefill=2, num_decode=2, warm=False) as stack:
        for replica in (stack.prefill[1], stack.decode[1]):
            _speak_of_more(replica.server)
        feed.subscribe(stack.gateway.membership.replace)
        broken = {**_published(stack.decode[0]), "url": None}
        for pool, replicas in (("prefill", stack.prefill), ("decode", stack.decode)):
            metadata = {replica.replica_id: _published(replica) for replica in replicas}
            metadata[replicas[1].replica_id] |= LATER
            feed.report(pool, metadata | ({"d9": broken} if pool == "decode" else {}))
        return [*await _used(stack), await _told(stack)]


async def _used(stack: Stack) -> list[Row]:
    membership = stack.gateway.membership
    known = sorted(member.info.replica_id for pool in POOLS for member in membership.members(pool))
    await until(lambda: membership.num_warm_pairs() == 4, timeout_s=10)
    replies = await asyncio.gather(*(stack.complete() for _ in range(NUM_REQUESTS)))
    pairs = {(reply.headers["x-disagg-prefill"], reply.headers["x-disagg-decode"]) for reply in replies}
    good = sum(reply.status == 200 for reply in replies)
    later = sum("p1" in pair or "d1" in pair for pair in pairs)
    return [
        Row(6, "replicas that publish an unknown field are known", ", ".join(known), "d0, d1, p0, p1", len(known) == 4),
        Row(
            6,
            "and used: pairs with one, answers",
            f"{later} of 3, {good} of {NUM_REQUESTS}",
            "all",
            later == 3 and good == NUM_REQUESTS,
        ),
        Row(
            6,
            "one that publishes no address is left out alone",
            f"d9 {'in' if 'd9' in known else 'out'}",
            "out",
            "d9" not in known,
        ),
    ]


async def _told(stack: Stack) -> Row:
    """What they answer is understood, too: statistics, health and events."""
    client = stack.client(stack.prefill[1])
    stats, health, events = await asyncio.gather(client.stats(), client.health(timeout_s=5), client.events(0, wait_s=0))
    said = f"{stats.prompt_tokens_total} tokens, {health.state}, {len(events.events)} events"
    holds = stats.prompt_tokens_total > 0 and health.state == "ok" and bool(events.events)
    return Row(6, "their answers with unknown fields are read", said, "all three", holds)


def _published(replica: Replica) -> dict[str, Any]:
    """As `record_replica_metadata` has it."""
    info: Mapping[str, Any] = vars(replica.info)
    return {name: value for name, value in info.items() if name != "replica_id"}


def _speak_of_more(server: EngineServer) -> None:
    """Put unknown fields into whatever this server tells the gateway of itself."""
    respond = server._control

    async def control(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name != b"content-length"]
                message = {**message, "headers": headers}
            elif body := message.get("body"):
                message = {**message, "body": b'{"colour": "blue", ' + body.lstrip()[1:]}
            await send(message)

        await respond(scope, receive, sending)

    server._control = control  # type: ignore[method-assign]
