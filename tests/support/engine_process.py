# SPDX-License-Identifier: Apache-2.0
"""One real vLLM engine behind an `EngineServer`, as a process of its own and without Ray.

Run as `python -m tests.support.engine_process '<json>'`; the first line on stdout is the URL. It ends when its stdin
closes, so that no engine outlives the test that started it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys


async def main(settings: dict[str, object]) -> None:
    from pools.engine.vllm_engine import VllmEngine
    from pools.replica.server import EngineServer, OpenRequests, unwatched

    engine = VllmEngine(settings["arguments"])  # type: ignore[arg-type]
    await engine.start()
    server = EngineServer(
        engine,
        role=settings["role"],  # type: ignore[arg-type]
        host="127.0.0.1",
        incarnation=str(settings["role"]),
        health=unwatched,
        requests=OpenRequests(),
    )
    print(await server.start(), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop()
    await engine.shutdown()


if __name__ == "__main__":
    parsed = json.loads(sys.argv[1])
    os.environ.update(parsed["env"])
    import uvloop

    uvloop.run(main(parsed))
