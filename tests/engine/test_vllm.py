# SPDX-License-Identifier: Apache-2.0
"""A pair of real vLLM engines without Ray: the contract that the fake keeps too, and the host-platform fixes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from pools.testing.contract import CHECKS, Check, Engines
from tests.support.engines import transfer_engine
from tests.support.replaced import ask, engine_processes, listed, listener
from tests.support.stack import side_by_side
from transport.config import NixlConfig
from transport.handoff_params import HANDOFF_ID, REMOTE_DECODE

PROMPTS = (
    "The river runs past the old mill and the stone bridge, and the letters arrive in the morning. " * 4,
    "Seven copper lamps hang in the quiet window of the paper house beside the northern garden. " * 4,
)


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """A prefill and a decode engine over NIXL."""
    transport = NixlConfig()
    with side_by_side(
        transfer_engine("prefill", transport, name="engine"), transfer_engine("decode", transport, name="engine")
    ) as (prefill, decode):
        yield Engines(prefill, decode, "tiny", PROMPTS)


@pytest.mark.parametrize(
    "check", [c for c in CHECKS if c.__name__ != "a_lost_prefill_engine_costs_a_recompute"], ids=lambda c: c.__name__
)
def test_vllm_engines_keep_the_contract(check: Check, engines: Engines) -> None:
    """Two vLLM engines over NIXL pass every check that the fake ones pass."""
    asyncio.run(check(engines))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_is_replaced_in_each_process_is_what_the_lists_say(role: str, engines: Engines) -> None:
    """API process, EngineCore and worker of a running engine hold the replacements of their process and no other."""
    found = engine_processes(listener(getattr(engines, role)))
    assert set(found) == {"api", "engine_core", "worker"}
    assert {name: ask(process.pid) for name, process in found.items()} == {name: listed(name) for name in found}


def test_a_worker_listens_for_peers_alone(engines: Engines) -> None:
    """A worker has some twenty process groups and fewer ports than that: of NIXL those that its peers are told."""
    worker = engine_processes(listener(engines.prefill))["worker"]
    ports = [c for c in worker.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert 1 <= len(ports) <= 8, ports


def test_seeded_chunked_prefill_lives(engines: Engines) -> None:
    """A seeded request whose prefill is chunked answers the same twice; unmended, it kills a CPU engine."""
    body = {
        "model": "tiny",
        "prompt": [20 + i * 11 % 1400 for i in range(3500)],
        "max_tokens": 8,
        "seed": 5,
        "temperature": 1.0,
        "return_token_ids": True,
    }
    with httpx.Client(timeout=120) as client:
        first, second = (
            client.post(f"{engines.prefill}/v1/completions", json={**body, "cache_salt": str(i)}).json()
            for i in range(2)
        )
    assert first["choices"][0]["token_ids"] == second["choices"][0]["token_ids"]


def test_callers_that_leave_at_any_moment_pin_no_kv(engines: Engines) -> None:
    """Decode legs cut off at any of many moments and settled leave no KV pinned on the prefill engine."""
    asyncio.run(_cut_off(engines))


async def _assert_unpinned(client: httpx.AsyncClient, engines: Engines, before: dict[str, Any]) -> None:
    """Within five seconds the prefill engine holds no more KV than `before`, and no lease had to end for it."""
    for _ in range(50):
        now = (await client.get(f"{engines.prefill}/disagg/v1/stats")).json()
        if now["kv_cache_usage"] <= before["kv_cache_usage"]:
            break
        await asyncio.sleep(0.1)
    assert now["kv_cache_usage"] <= before["kv_cache_usage"]
    assert now["num_kv_expired_reqs_total"] == before["num_kv_expired_reqs_total"]


async def _cut_off(engines: Engines) -> None:
    decode = urlsplit(engines.decode)
    async with httpx.AsyncClient(timeout=60) as client:
        before = (await client.get(f"{engines.prefill}/disagg/v1/stats")).json()
        given_up: list[str] = []
        for step in range(40):
            ids = [20 + (step * 37 + i * 7) % 1400 for i in range(300)]
            body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "kv_transfer_params": REMOTE_DECODE}
            params = (await client.post(f"{engines.prefill}/v1/completions", json=body)).json()["kv_transfer_params"]
            asked = {"model": "tiny", "prompt": ids, "max_tokens": 200, "stream": True, "kv_transfer_params": params}
            raw = json.dumps(asked).encode()
            _, writer = await asyncio.open_connection(decode.hostname, decode.port)
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
            await writer.drain()
            await asyncio.sleep(step * 0.0005)
            writer.transport.abort()
            given_up.append(params["remote_request_id"])
        await client.post(f"{engines.prefill}/disagg/v1/settle", json={"handoff_ids": given_up})
        await _assert_unpinned(client, engines, before)


def test_an_abort_never_loses_a_hand_off(engines: Engines) -> None:
    """A prefill leg aborted at any moment, its last step included, and then settled by its hand-off id pins nothing."""
    asyncio.run(_abort_around_the_end(engines))


async def _abort_around_the_end(engines: Engines) -> None:
    async with httpx.AsyncClient(timeout=60) as client:

        async def leg(number: int) -> None:
            ids = [20 + (number * 41 + i * 11) % 1400 for i in range(300)]
            params = {**REMOTE_DECODE, HANDOFF_ID: f"abort-{number}"}
            body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "kv_transfer_params": params}
            headers = {"x-request-id": f"abort-{number}"}
            await client.post(f"{engines.prefill}/v1/completions", json=body, headers=headers)

        async def settle(number: int) -> None:
            settled = {"handoff_ids": [f"abort-{number}"]}
            await client.post(f"{engines.prefill}/disagg/v1/settle", json=settled)

        before = (await client.get(f"{engines.prefill}/disagg/v1/stats")).json()
        loop = asyncio.get_running_loop()
        started = loop.time()
        await leg(0)
        await settle(0)
        usual = loop.time() - started
        for number in range(1, 61):
            running = asyncio.create_task(leg(number))
            await asyncio.sleep(usual * (0.4 + number / 75))
            body = {"request_id": f"abort-{number}"}
            await client.post(f"{engines.prefill}/disagg/v1/abort", json=body)
            await running
            await settle(number)
        await _assert_unpinned(client, engines, before)


def test_a_lost_prefill_engine_costs_a_recompute(engines: Engines) -> None:
    """Hand-off parameters of an engine that is not there cost a recomputation. Last, because it waits for NIXL."""
    check = next(c for c in CHECKS if c.__name__ == "a_lost_prefill_engine_costs_a_recompute")
    asyncio.run(check(engines))
