# SPDX-License-Identifier: Apache-2.0
"""`python -m pools.engine.fake`: one fake engine as a process that prints its URL."""

from __future__ import annotations

import argparse
import asyncio
import socket
import uuid
from collections.abc import Callable, Sequence
from typing import get_args

import uvicorn

from pools.config import FakeEngineConfig
from pools.engine.base import Role
from pools.engine.fake.engine import FakeEngine
from pools.replica.server import EngineServer, OpenRequests, unwatched


def main(argv: Sequence[str] | None = None) -> None:
    """Serve one fake engine until a signal; the first line on stdout is its URL."""
    parser = argparse.ArgumentParser(prog="python -m pools.engine.fake", description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: the kernel chooses")
    parser.add_argument("--role", choices=get_args(Role), default="decode")
    parser.add_argument("--model", default="tiny", help="name that clients send as `model`")
    parser.add_argument("--engine-id", default=None)
    parser.add_argument("--incarnation", default="1", help="what the gateway is told to find at its address")
    config = FakeEngineConfig(type="fake")
    for name in ("itl_ms", "prefill_ms_per_1k_tokens", "kv_tokens", "max_model_len", "max_num_seqs"):
        default = getattr(config, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--own-steps", dest="shared_steps", action="store_false", help="no step shared by all streams")
    args = vars(parser.parse_args(argv))
    fields = {name: value for name, value in args.items() if name in FakeEngineConfig.model_fields}
    engine = FakeEngine(
        args["engine_id"] or uuid.uuid4().hex,
        args["role"],
        FakeEngineConfig(type="fake", **fields),
        model_id=args["model"],
        host=args["host"],
    )
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(engine, args["role"], args["host"], args["port"], args["incarnation"]))


async def _run(engine: FakeEngine, role: Role, host: str, port: int, incarnation: str) -> None:
    await engine.start()
    app = EngineServer(engine, role=role, host=host, incarnation=incarnation, health=unwatched, requests=OpenRequests())
    sock = socket.create_server((host, port))
    print(f"http://{host}:{sock.getsockname()[1]}", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=120))
    try:
        await server.serve(sockets=[sock])
    finally:
        await engine.shutdown()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


if __name__ == "__main__":
    main()
