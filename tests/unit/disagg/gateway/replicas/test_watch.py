# SPDX-License-Identifier: Apache-2.0
"""Replicas whose engine hangs, that do not answer, that are slow or that die one after the other."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from disagg.config import AdminConfig, GatewayConfig
from disagg.gateway.replicas import watch
from disagg.gateway.replicas.membership import Member
from pools.client.http1 import Upstream
from pools.client.replica import NO_TRACE, ReplicaClient
from pools.client.routes import COMPLETIONS, ENGINE_KEY_HEADER
from pools.engine.base import Receive, Scope, Send
from pools.errors import ReplicaLostError
from pools.health.health import EngineHealth
from pools.testing.client import request
from tests.support.gateway_stack import Replica, Stack, running_stack, until

PROMPT = "a prompt longer than one block of KV, so that it is handed off"
OK = EngineHealth(probe_s=0.001, num_probes=1)
HANGS = EngineHealth(state="suspect", reason="hang", since_s=1.0)
QUICK = GatewayConfig(watch_interval_s=0.02)
DECODE_ONLY = GatewayConfig(watch_interval_s=0.02, prefill_alone_tokens=0)
PROBATION = GatewayConfig(watch_interval_s=0.02, probation_s=60)


def say(replica: Replica, health: EngineHealth) -> None:
    """What the replica answers from here on about its engine."""
    replica.health = lambda: health


def state(stack: Stack, replica_id: str) -> Any:
    members = [m for pool in ("prefill", "decode") for m in stack.gateway.membership.members(pool)]
    return next(m for m in members if m.info.replica_id == replica_id)


async def decodes(stack: Stack, number: int = 6) -> set[str]:
    """The decode replicas that answer `number` requests."""
    replies = [await stack.complete(PROMPT) for _ in range(number)]
    assert all(reply.status == 200 for reply in replies)
    return {reply.headers["x-disagg-decode"] for reply in replies}


async def stalled(scope: Scope, receive: Receive, send: Send) -> bool:
    """An engine that takes a request and never answers it."""
    while (await receive())["type"] != "http.disconnect":
        pass
    return True


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_hanging_engine_is_taken_out_and_its_requests_go_elsewhere(pool: str) -> None:
    """A request that waits for an engine that hangs is answered by another one, long before any time-out."""
    async with running_stack(num_prefill=2, num_decode=2, config=QUICK) as stack:
        replica = (stack.prefill if pool == "prefill" else stack.decode)[0]
        replica.engine.hook = stalled
        asked = [asyncio.ensure_future(stack.complete(PROMPT)) for _ in range(4)]
        await until(lambda: replica.engine.seen)
        say(replica, HANGS)
        replies = await asyncio.gather(*asked)
        assert [reply.status for reply in replies] == [200] * 4 and len({reply.text for reply in replies}) == 1
        assert state(stack, replica.replica_id).quarantined == "hang"
        assert stack.metric("disagg_quarantines_total", pool=pool, reason="hang") == 1
        seen = len(replica.engine.seen)
        await decodes(stack)
        assert len(replica.engine.seen) == seen


async def test_requests_on_their_way_fail_too() -> None:
    """A request that reaches the replica only after it was taken out does not wait there either."""
    async with running_stack(num_decode=2, config=QUICK) as stack:
        replica = stack.decode[0]
        say(replica, HANGS)
        await until(lambda: state(stack, "d0").quarantined)
        replica.engine.hook = stalled
        with pytest.raises(ReplicaLostError, match="hangs"):
            await stack.client(replica).decode(COMPLETIONS, b"{}", request_id="r", trace=NO_TRACE)


async def test_back_to_ok_its_pairs_are_warmed_first() -> None:
    """It may take local requests at once, and hand-offs after KV has moved again."""
    async with running_stack(num_prefill=2, num_decode=1, config=QUICK) as stack:
        warmed = stack.metric("disagg_pair_warm_attempts_total", outcome="ok")
        say(stack.prefill[0], HANGS)
        await until(lambda: state(stack, "p0").quarantined)
        assert stack.gateway.membership.num_warm_pairs() == 1 and not stack.gateway.membership.cold_pairs()
        assert stack.gateway.membership.num_routable("prefill") == 1
        say(stack.prefill[0], OK)
        await until(lambda: stack.gateway.membership.num_warm_pairs() == 2)
        assert state(stack, "p0").quarantined is None
        assert stack.metric("disagg_pair_warm_attempts_total", outcome="ok") == warmed + 1


async def test_silent_process_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that answers nothing twice is out as well; the last decode replica gets more patience, not for ever."""
    monkeypatch.setattr(watch, "_ANSWER_S", 0.1)
    async with running_stack(num_decode=2, config=DECODE_ONLY) as stack:
        never = asyncio.Event()
        asked = {"d0": 0, "d1": 0}
        taken_out: dict[str, tuple[int, str]] = {}
        quarantine = stack.gateway.membership.quarantine

        def noted(member: Member, reason: str) -> bool:
            taken_out.setdefault(member.info.replica_id, (asked[member.info.replica_id], reason))
            return quarantine(member, reason)

        stack.gateway.membership.quarantine = noted  # type: ignore[method-assign]

        def silence(replica: Replica) -> None:
            async def silent(query: dict[str, str]) -> dict[str, Any]:
                asked[replica.replica_id] += 1
                await never.wait()
                return {}

            replica.server._tell_health = silent  # type: ignore[method-assign]

        silence(stack.decode[0])
        await until(lambda: taken_out)
        assert await decodes(stack) == {"d1"}
        silence(stack.decode[1])
        await until(lambda: len(taken_out) == 2)
        assert taken_out == {"d0": (2, "unanswered"), "d1": (5, "unanswered")}
        assert stack.metric("disagg_quarantines_total", pool="decode", reason="unanswered") == 2
        never.set()
        for replica in stack.decode:
            del replica.server._tell_health
        await until(lambda: not state(stack, "d0").quarantined and not state(stack, "d1").quarantined)


async def test_a_gateway_that_stood_still_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that was waited for much longer than the limit was missed by the gateway itself; it asks again."""
    monkeypatch.setattr(watch, "_ANSWER_S", 0.05)
    async with running_stack(num_decode=2, config=QUICK) as stack:
        num_asked = 0
        never = asyncio.Event()

        async def silent(query: dict[str, str]) -> dict[str, Any]:
            nonlocal num_asked
            num_asked += 1
            await never.wait()
            return {}

        (watched_one,) = watched(stack, "d0")
        jumps = itertools.count(0, 10)
        stack.gateway.watch._clock = lambda: float(next(jumps))
        stack.decode[0].server._tell_health = silent  # type: ignore[method-assign]
        await until(lambda: num_asked > 5)
        assert watched_one.misses == 0 and state(stack, "d0").quarantined is None and state(stack, "d0").reachable
        stack.gateway.watch._clock = asyncio.get_running_loop().time
        await until(lambda: state(stack, "d0").quarantined == "unanswered")
        never.set()


async def test_a_replica_that_breaks_every_connection_is_taken_out() -> None:
    """It lives, takes connections and closes them: from the fifth in a row on each is a miss."""
    async with running_stack(num_decode=2, config=QUICK) as stack:
        server = stack.decode[0].server
        num_broken = 0

        async def breaking(query: dict[str, str]) -> dict[str, Any]:
            nonlocal num_broken
            num_broken += 1
            assert server._server is not None
            for connection in list(server._server.server_state.connections):
                connection.transport.abort()
            return {}

        server._tell_health = breaking  # type: ignore[method-assign]
        await until(lambda: state(stack, "d0").quarantined == "unanswered")
        assert num_broken >= 6
        del server._tell_health
        await until(lambda: state(stack, "d0").quarantined is None)


async def test_a_failure_of_its_own_does_not_end_the_watch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once with its traceback, is no miss, and the watch goes on."""
    async with running_stack(num_decode=2, config=QUICK) as stack:
        num_failed = 0

        async def failing(self: ReplicaClient, *, timeout_s: float) -> Any:
            nonlocal num_failed
            num_failed += 1
            raise RuntimeError("not today")

        with monkeypatch.context() as patch:
            patch.setattr(ReplicaClient, "health", failing)
            await until(lambda: num_failed > 10)
        assert caplog.text.count("could not be watched") == caplog.text.count("Traceback") == 1
        assert not any(w.misses for w in stack.gateway.watch._watched.values())
        say(stack.decode[0], HANGS)
        await until(lambda: state(stack, "d0").quarantined == "hang")


async def test_probation_of_a_decode_replica_does_not_wait_for_prefill() -> None:
    """Nobody is there to move KV with: it is used once it has been well."""
    async with running_stack(num_decode=2, config=PROBATION) as stack:
        say(stack.prefill[0], HANGS)
        await until(lambda: state(stack, "p0").quarantined)
        member = state(stack, "d0")
        stack.gateway.membership.put_on_probation(member)
        # The prefill replica may be warmed at any time, as far as membership knows.
        stack.gateway.membership.is_warm = lambda member: False  # type: ignore[method-assign]
        stack.gateway.watch._probation_s = 0.0
        await until(lambda: not member.on_probation)


async def test_last_decode_replica_stays(caplog: pytest.LogCaptureFixture) -> None:
    """A suspect decode replica that nobody can stand in for is kept, said once, until another one is there."""
    async with running_stack(num_decode=1, config=DECODE_ONLY) as stack:
        say(stack.decode[0], HANGS)
        await until(lambda: "nobody else could answer" in caplog.text)
        assert (await stack.complete(PROMPT)).status == 200
        await asyncio.sleep(0.1)
        assert caplog.text.count("nobody else could answer") == 1
        await stack.join("decode", "d1")
        await until(lambda: state(stack, "d0").quarantined == "hang")
        assert await decodes(stack) == {"d1"}


async def test_draining_replica_is_not_chosen() -> None:
    """One that says it leaves gets nothing more, and what runs there goes on."""
    async with running_stack(num_decode=2, config=QUICK, itl_ms=1) as stack:
        async with stack.streaming("/v1/completions", prompt=PROMPT, max_tokens=300) as stream:
            _, headers = await stream.head()
            leaving = stack.decode[int(headers["x-disagg-decode"][1:])]
            leaving.server._draining = True
            await until(lambda: state(stack, leaving.replica_id).draining)
            assert await decodes(stack) == {"d0", "d1"} - {leaving.replica_id}
            parts = []
            while part := await stream.chunk():
                parts.append(part)
        events = b"".join(parts).split(b"\n\n")
        assert events[-2] == b"data: [DONE]" and b"error" not in b"".join(parts)


async def test_slow_replica_is_the_last_choice() -> None:
    """Three slow probes, and it is chosen only when there is no other; with a quick one it is back."""
    async with running_stack(num_decode=2, config=QUICK) as stack:
        say(stack.decode[1], OK)
        await until(lambda: watched(stack, "d1")[0].probe)
        for number in range(1, 4):
            say(stack.decode[0], EngineHealth(probe_s=2.0, num_probes=number))
            await until(partial(was_judged, stack, "d0", number))
        await until(lambda: state(stack, "d0").slow)
        assert await decodes(stack) == {"d1"}
        stack.decode[1].kill()
        await until(lambda: not state(stack, "d1").reachable)
        assert await decodes(stack) == {"d0"}
        say(stack.decode[0], EngineHealth(probe_s=0.01, num_probes=4))
        await until(lambda: not state(stack, "d0").slow)


def was_judged(stack: Stack, replica_id: str, number: int) -> bool:
    """Whether the watch has seen that probe."""
    return any(w.probe and w.probe.number == number for w in watched(stack, replica_id))


def watched(stack: Stack, replica_id: str) -> list[watch._Watched]:
    return [w for w in stack.gateway.watch._watched.values() if w.member.info.replica_id == replica_id]


async def test_crash_loop_puts_new_replicas_on_probation(caplog: pytest.LogCaptureFixture) -> None:
    """After three lost ones the next is used only when it was warm and well for a while; its pool's others go on."""
    async with running_stack(num_decode=2, config=PROBATION) as stack:
        for _ in range(3):
            stack.decode[0].kill()
            await until(lambda: not state(stack, "d0").reachable)
            assert not state(stack, "d0").on_probation
            await stack.decode[0].restart()
            stack.announce()
        assert caplog.text.count("loses one replica after the other") == 1
        assert stack.metric("disagg_crash_loops_total", pool="decode") == 1
        member = state(stack, "d0")
        assert member.on_probation
        await stack.warmed()
        assert member.on_probation and await decodes(stack, 2) == {"d1"}
        await until(lambda: watched(stack, "d0")[0].ok_since is not None)
        stack.gateway.watch._probation_s = 0.0
        await until(lambda: not member.on_probation)
        assert await decodes(stack) == {"d0", "d1"}


async def test_probation_does_not_leave_nobody() -> None:
    """A decode replica on probation serves when there is no other, without a hand-off."""
    async with running_stack(num_decode=1, config=PROBATION) as stack:
        stack.gateway.membership.put_on_probation(state(stack, "d0"))
        reply = await stack.complete(PROMPT)
        assert (reply.status, reply.headers["x-disagg-prefill"]) == (200, "local")


async def test_another_process_at_its_address() -> None:
    """An answer that names another incarnation is none of this replica's."""
    async with running_stack(num_decode=2, config=QUICK) as stack:
        stack.decode[0].server._incarnation = "another"
        await until(lambda: not state(stack, "d0").reachable)
        assert await decodes(stack) == {"d1"}


KEY: Sequence[tuple[str, str]] = [("authorization", "Bearer secret-1")]


async def test_states_are_shown(tmp_path: Path) -> None:
    """The admin API names the state and the reason, and the gauge counts them."""
    (tmp_path / "key").write_text("secret-1")
    config = GatewayConfig(watch_interval_s=0.02, admin=AdminConfig(key_file=str(tmp_path / "key")))
    async with running_stack(num_prefill=2, num_decode=2, config=config) as stack:
        say(stack.prefill[0], HANGS)
        stack.decode[0].server._draining = True
        await until(lambda: state(stack, "p0").quarantined and state(stack, "d0").draining)
        state(stack, "p1").slow = True
        pools = (await stack.call("GET", "/admin/v1/pools", None, KEY)).json()["pools"]
        shown = {r["replica_id"]: (r["state"], r["reason"]) for pool in pools for r in pool["replicas"]}
        assert shown["p0"] == ("quarantined", "hang") and shown["d0"] == ("draining", None)
        assert shown["p1"][0] in ("slow", "routable") and shown["d1"] == ("routable", None)
        assert [pool["num_routable"] for pool in pools] == [1, 1]
        await stack.call("GET", "/metrics")
        assert stack.metric("disagg_replicas", pool="prefill", state="quarantined") == 1


async def test_health_route() -> None:
    """`/disagg/v1/health` tells what the replica knows; a drain shows, unless the engine hangs."""
    async with running_stack() as stack:
        server, key = stack.decode[0].server, {ENGINE_KEY_HEADER: stack.decode[0].key}

        async def asked() -> dict[str, Any]:
            told: dict[str, Any] = (await request("GET", f"{server.url}/disagg/v1/health", headers=key)).json()
            return told

        assert (await asked())["state"] == "ok"
        server._draining = True
        assert (await asked())["state"] == "draining"
        say(stack.decode[0], HANGS)
        told = await asked()
        assert (told["state"], told["reason"], told["since_s"], told["probe_s"]) == ("suspect", "hang", 1.0, None)
        assert msgspec.to_builtins(await stack.client(stack.decode[0]).health(timeout_s=5)) == told


def refusing(error: ReplicaLostError, monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    """No new connection to any engine comes about; those that are there are closed."""

    async def fails(self: Upstream) -> Any:
        raise error

    monkeypatch.setattr(Upstream, "_connect", fails)
    for replica in stack.replicas:
        for connection in list(stack.client(replica)._upstream._connections):
            connection.abandon()


async def test_no_way_to_a_host_is_not_tried_without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that fails at once is a miss, and the next one comes when it is due."""
    async with running_stack(num_decode=2) as stack:
        refusing(ReplicaLostError("no route", sent=False), monkeypatch, stack)
        watched = stack.gateway.watch._watched[stack.prefill[0].incarnation]
        assert 0.5 < await stack.gateway.watch._ask(watched) <= stack.gateway.config.watch_interval_s
        assert watched.misses == 1 and not state(stack, "p0").reachable


async def test_out_of_descriptors(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A gateway that can open nothing refuses for a while, and loses no replica by it."""
    async with running_stack(num_prefill=2, num_decode=2, config=QUICK) as stack:
        with monkeypatch.context() as patched:
            refusing(ReplicaLostError("no descriptors", sent=False, own=True), patched, stack)
            reply = await stack.complete(PROMPT)
            assert (reply.status, reply.json()["error"]["code"]) == (503, "no_replica_ready")
            assert "retry-after" in reply.headers
            await until(lambda: "want of descriptors" in caplog.text)
            for _ in range(5):
                for watched in list(stack.gateway.watch._watched.values()):
                    await stack.gateway.watch._ask(watched)
            assert all(m.usable for pool in ("prefill", "decode") for m in stack.gateway.membership.members(pool))
        assert await decodes(stack)
        assert stack.metric("disagg_quarantines_total", pool="decode", reason="unanswered") == 0
