# SPDX-License-Identifier: Apache-2.0
"""One real prefill engine with host memory and a disk below its KV space: what falls out comes back unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from pools.plan.launch import HOST_WORKER_EXTENSION
from tests.support.stack import ENGINE_KWARGS, engine_process, free_port, tiny_model, wait_until
from transport.config import NixlConfig
from transport.facts import EngineFacts
from transport.launch import launch
from transport.tiers import OffloadConfig

BLOCKS = 40
"""KV blocks of 128 tokens: room for 5,120 tokens."""
PREFIX_TOKENS = 3000
NUM_PREFIXES = 5
LONG_ANSWER = 260


def _prompt(number: int, tokens: int = PREFIX_TOKENS) -> list[int]:
    return [20 + (number * 7919 + i * (11 + number)) % 1400 for i in range(tokens)]


def _engine(  # type: ignore[no-untyped-def]
    name: str, offload: dict[str, Any] | None, num_blocks: int = BLOCKS, **changes: Any
):
    """One engine whose prefills are never chunked, so that batches differ as little as they can."""
    arguments: dict[str, Any] = {
        **ENGINE_KWARGS,
        "enforce_eager": True,
        "dtype": "float32",
        "model": str(tiny_model()),
        "served_model_name": ["tiny"],
        "distributed_executor_backend": "mp",
        "worker_extension_cls": HOST_WORKER_EXTENSION,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 8192,
        "num_gpu_blocks_override": num_blocks,
        **changes,
    }
    env: dict[str, str] = {}
    if offload is not None:
        facts = EngineFacts(
            role="prefill",
            platform="cpu",
            host="127.0.0.1",
            listener_port=free_port(),
            engine_id=f"{name}-{uuid.uuid4().hex[:8]}",
        )
        plan = launch(NixlConfig(), facts, offload=OffloadConfig.model_validate(offload))
        arguments["kv_transfer_config"] = plan.kv_transfer_config
        env = plan.env
    return engine_process(arguments, env, role="prefill", name=f"offload-{name}")


async def _tokens(client: httpx.AsyncClient, url: str, prompt: Sequence[int], max_tokens: int = 4) -> list[int]:
    body = {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "return_token_ids": True,
    }
    answer = await client.post(f"{url}/v1/completions", json=body)
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        yield client


async def _in_turn(url: str, numbers: Sequence[int]) -> list[list[int]]:
    async with _client() as client:
        return [await _tokens(client, url, _prompt(number)) for number in numbers]


async def _together(url: str) -> list[list[int]]:
    """Ten requests that fit one by one but not together, with answers long enough to grow out of the KV space."""
    async with _client() as client:
        return await asyncio.gather(
            *(_tokens(client, url, _prompt(100 + number, 500), LONG_ANSWER) for number in range(10))
        )


def _metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=20).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


@pytest.fixture(scope="module")
def reference() -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Answers of an engine without any tier and with room for everything."""
    with _engine("none", None, num_blocks=400) as url:
        first = asyncio.run(_in_turn(url, range(NUM_PREFIXES)))
        yield first, asyncio.run(_together(url))


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """An engine with 0.25 GiB of host memory, which holds all that the tests ask for."""
    with _engine("host", {"cpu_gib": 0.25}) as url:
        yield url


def test_evicted_prefixes_come_from_host_memory(reference: Any, engine: str) -> None:
    """Prefixes three times larger than the KV space evict each other; the second pass is loaded, with equal tokens."""
    numbers = range(NUM_PREFIXES)
    assert asyncio.run(_in_turn(engine, numbers)) == reference[0]
    hits, loaded = (
        _metric(engine, "vllm:external_prefix_cache_hits_total"),
        _metric(engine, "vllm:kv_offload_load_bytes_total"),
    )
    assert _metric(engine, "vllm:kv_offload_store_bytes_total") > 0
    assert asyncio.run(_in_turn(engine, numbers)) == reference[0]
    whole_blocks = PREFIX_TOKENS // 128 * 128
    # The last prefix of the first pass may still have blocks in the KV space.
    assert _metric(engine, "vllm:external_prefix_cache_hits_total") - hits >= (NUM_PREFIXES - 1) * whole_blocks
    assert _metric(engine, "vllm:kv_offload_load_bytes_total") > loaded
    assert _metric(engine, "vllm:kv_offload_load_time_total") > 0
    assert _metric(engine, "vllm:kv_offload_store_time_total") > 0


def test_preemption_keeps_tokens_right(reference: Any, engine: str) -> None:
    """Requests that outgrow the KV space preempt each other while their blocks are stored; their answers are those of
    an engine with room for all."""
    before = _metric(engine, "vllm:num_preemptions_total")
    answers = asyncio.run(_together(engine))
    assert _metric(engine, "vllm:num_preemptions_total") > before
    assert answers == reference[1]


def test_an_abort_storm_leaves_the_engine_alive(reference: Any, engine: str) -> None:
    """Callers that leave at any moment, while their prompt is loaded, computed or stored, cost nothing lasting."""
    asyncio.run(_storm(engine))
    wait_until(
        lambda: httpx.get(f"{engine}/disagg/v1/stats", timeout=20).json()["kv_cache_usage"] == 0,
        20,
        "no KV block is held",
    )
    assert asyncio.run(_in_turn(engine, range(NUM_PREFIXES))) == reference[0]
    wait_until(lambda: _pinned_share(engine) == 0, 20, "no host memory is held for a transfer")


def _pinned_share(url: str) -> float:
    # The gauge is as old as the last step, so let there be one without KV to store.
    asyncio.run(_short(url))
    return _metric(url, "vllm:kv_offload_cpu_cache_usage_perc")


async def _short(url: str) -> None:
    async with _client() as client:
        await _tokens(client, url, _prompt(1, 20))


async def _storm(url: str) -> None:
    async with _client() as client:

        async def leave(number: int) -> None:
            prompt = _prompt(number % NUM_PREFIXES if number % 3 else 300 + number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01 + number * 7 % 40 * 0.02):
                    await _tokens(client, url, prompt, 50)

        for start in range(0, 60, 6):
            await asyncio.gather(*(leave(number) for number in range(start, start + 6)))


def test_a_second_engine_is_served_from_the_disk(reference: Any, tmp_path: Path) -> None:
    """Files that one engine left serve another one with equal tokens, and /dev/shm holds nothing of either."""
    offload = {"cpu_gib": 0.0625, "disk": {"path": str(tmp_path)}}
    numbers = range(NUM_PREFIXES)
    with _engine("disk-1", offload) as url:
        assert asyncio.run(_in_turn(url, numbers)) == reference[0]
        assert not glob.glob("/dev/shm/vllm_offload_*disk-1*")
        wait_until(lambda: _metric(url, "vllm:kv_offload_tiering_active_cascade_jobs") == 0, 20, "all is written")
    assert len(list(tmp_path.rglob("*.bin"))) == NUM_PREFIXES * (PREFIX_TOKENS // 128)
    with _engine("disk-2", offload) as url:
        assert asyncio.run(_in_turn(url, numbers)) == reference[0]
        hits = _metric(url, "vllm:external_prefix_cache_hits_total")
        assert hits == NUM_PREFIXES * (PREFIX_TOKENS // 128 * 128)
        assert _metric(url, "vllm:kv_offload_tiering_read_bytes_total") > 0
        assert not glob.glob("/dev/shm/vllm_offload_*disk-2*")
