# SPDX-License-Identifier: Apache-2.0
"""What the application does under Ray Serve, on fake engines: HAProxy, scaling, killed replicas."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import pytest

from tests.prove.serve_scale import Load
from tests.support.stack import Stack, wait_until


def test_streams_are_spliced_behind_haproxy(fake_haproxy_stack: Stack) -> None:
    """Behind HAProxy a stream goes socket to socket, whole and in order.

    Until HAProxy has found the gateway, moments after the start, Serve's own proxy stands in and the path is ASGI.
    """
    body = {"model": "tiny", "prompt": [40] * 50, "max_tokens": 50, "stream": True, "ignore_eos": True}
    url = f"{fake_haproxy_stack.url}/v1/completions"

    def spliced() -> bool:
        with httpx.Client(timeout=60) as client, client.stream("POST", url, json=body) as answer:
            assert answer.status_code == 200
            lines = [line for line in answer.iter_lines() if line]
        assert len(lines) == 51
        assert lines[-1] == "data: [DONE]"
        metrics = httpx.get(f"{fake_haproxy_stack.url}/metrics", timeout=30).text
        return 'disagg_streams_total{path="splice"}' in metrics

    wait_until(spliced, 30, "a stream is spliced")


def test_one_request_id(fake_haproxy_stack: Stack) -> None:
    """The request id is in the answer once, and is the client's."""
    answer = httpx.post(
        f"{fake_haproxy_stack.url}/v1/completions",
        json={"model": "tiny", "prompt": [40] * 5, "max_tokens": 1},
        headers={"x-request-id": "mine-1"},
        timeout=30,
    )
    assert answer.headers.get_list("x-request-id") == ["mine-1"]


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_scaling_cuts_nothing(pool: str, fake_haproxy_stack: Stack) -> None:
    """A pool goes to two replicas and back under load; no answer fails and no other replica restarts."""
    load = Load(fake_haproxy_stack.url, 300)
    load.start()
    try:
        with fake_haproxy_stack.client() as client:
            before = {r.replica_id: r.incarnation for p in client.pools() for r in p.replicas}
            grown = client.pool(pool).scale(2).wait(timeout_s=120)
            added = {r.replica_id for r in grown.replicas} - before.keys()
            wait_until(lambda: bool(added & load.replicas), 60, "the new replica serves")
            after = {r.replica_id: r.incarnation for p in client.pools() for r in p.replicas}
            client.pool(pool).scale(1).wait(timeout_s=120)
    finally:
        load.stop()
    assert load.failed == []
    assert load.finished > 0
    assert {k: after[k] for k in before} == before


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_killed_replica_comes_back(pool: str, fake_haproxy_stack: Stack) -> None:
    """A replica killed with SIGKILL is replaced, warmed and used."""
    with fake_haproxy_stack.client() as client:
        victim = client.pool(pool).status().replicas[0]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)

        def replaced() -> bool:
            now = client.pool(pool).status()
            return now.num_routable == 1 and now.replicas[0].replica_id != victim.replica_id

        wait_until(replaced, 60, "the killed replica is replaced", 0.5)
        successor = client.pool(pool).status().replicas[0].replica_id
    answer = httpx.post(
        f"{fake_haproxy_stack.url}/v1/completions",
        json={"model": "tiny", "prompt": [41] * 50, "max_tokens": 2},
        timeout=30,
    )
    assert answer.status_code == 200
    assert answer.headers[f"x-disagg-{pool}"] == successor


def test_scaling_needs_the_external_scaler(mooncake_stack: Stack) -> None:
    """Without external_scaler_enabled scaling is refused with 409 and says what to set; nothing changes."""
    answer = httpx.post(
        f"{mooncake_stack.url}/admin/v1/pools/decode/scale",
        json={"num_replicas": 2},
        headers={"authorization": f"Bearer {mooncake_stack.admin_key}"},
        timeout=30,
    )
    assert answer.status_code == 409
    assert "external_scaler_enabled" in answer.json()["error"]["message"]
    assert asyncio.run(_pools(mooncake_stack)) == {"prefill": 1, "decode": 1}


async def _pools(stack: Stack) -> dict[str, int]:
    from disagg import AsyncClient

    async with AsyncClient(stack.url, api_key=stack.admin_key) as client:
        return {pool.name: len(pool.replicas) for pool in await client.pools()}
