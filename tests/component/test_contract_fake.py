# SPDX-License-Identifier: Apache-2.0
"""The engine contract on two fake engines over loopback: what real engines are held to, in a second."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from pools.config import FakeEngineConfig
from pools.engine.base import Role
from pools.engine.fake.engine import FakeEngine
from pools.replica.server import EngineServer, OpenRequests, unwatched
from pools.testing.contract import CHECKS, Check, Engines

PROMPTS = ("The quick brown fox jumps over the lazy dog, twice.", "A second prompt of more than thirty-two tokens.")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_fake_engines_keep_the_contract(check: Check) -> None:
    """Two fake engines pass every check that real ones must pass."""
    asyncio.run(_run(check))


async def _run(check: Check) -> None:
    config = FakeEngineConfig(type="fake", itl_ms=1.0)
    servers: list[EngineServer] = []
    engines: list[FakeEngine] = []
    try:
        for role in ("prefill", "decode"):
            engine = FakeEngine(f"{role}-1", cast("Role", role), config, model_id="tiny")
            await engine.start()
            server = EngineServer(
                engine,
                role=cast("Role", role),
                host="127.0.0.1",
                incarnation="1",
                health=unwatched,
                requests=OpenRequests(),
            )
            await server.start()
            engines.append(engine)
            servers.append(server)
        await check(Engines(servers[0].url, servers[1].url, "tiny", PROMPTS))
    finally:
        for server in servers:
            await server.stop()
        for engine in engines:
            await engine.shutdown()
