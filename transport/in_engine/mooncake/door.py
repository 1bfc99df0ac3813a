# SPDX-License-Identifier: Apache-2.0
"""The two ports of a prefill engine on Mooncake that are Python's: its bootstrap server and its ZMQ side channel.

vLLM's bootstrap server listens on every address, keeps silent connections for ever and lets anybody add workers. vLLM's
side channel ends with the first message that does not have two parts, and takes messages of any size. The ports of
Mooncake's transfer engine are Mooncake's own code; nothing here touches them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from typing import Any, cast

import uvicorn
import zmq
import zmq.asyncio
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake import mooncake_utils
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_utils import RegisterWorkerPayload

from transport.bounded_http import HttpLimits, bounded_protocol

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 2**20
"""In one message a decode worker names the blocks of all requests of a step, a few bytes a block. zmq closes a
connection on which a message is longer than this limit."""
HANDSHAKE_MS = 5000
"""zmq closes a connection that has not finished zmq's own greeting by then. zmq has no limit on connections."""
HEARTBEAT_MS = 30_000
"""zmq closes a connection whose peer does not answer a heartbeat that long."""
_MAX_ADDRESS = 256
_START_S = 30.0


class BootstrapServer(mooncake_utils.MooncakeBootstrapServer):
    """Tells decode engines which workers this engine has, and listens on one address only."""

    def __init__(self, host: str, port: int, *, engine_id: str, tp_size: int, pp_size: int) -> None:
        self._engine_id = engine_id
        self._sizes = (tp_size, pp_size)
        super().__init__(host, port)

    def start(self, *, timeout: float = _START_S) -> None:
        """Listen; returns when the server answers.

        Raises:
            OSError: the address is taken.
            RuntimeError: the server did not start.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._socket = socket.create_server((self.host, self.port), family=family)
        config = uvicorn.Config(
            self.app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            http=bounded_protocol("Mooncake bootstrap", HttpLimits(body_s=10.0, max_connections=1024)),
            ws="none",
        )
        self.server = uvicorn.Server(config)
        answers = threading.Event()
        self.server_thread = threading.Thread(
            target=self._run, args=(self.server, self._socket, answers), name="mooncake_bootstrap_server", daemon=True
        )
        self.server_thread.start()
        answers.wait(timeout)
        if not self.server.started:
            self.shutdown()
            raise RuntimeError(f"the Mooncake bootstrap server did not start at {self.host}:{self.port}")

    @staticmethod
    def _run(server: uvicorn.Server, listener: socket.socket, answers: threading.Event) -> None:
        async def serve() -> None:
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            answers.set()
            await serving

        try:
            asyncio.run(serve())
        except Exception:
            logger.exception("the Mooncake bootstrap server ended")
        finally:
            answers.set()

    async def register_worker(self, payload: RegisterWorkerPayload) -> dict[str, str]:
        """As vLLM's, but it refuses workers that are not this engine's.

        Decode engines would ask such a worker for KV, and many of them would fill the memory.
        """
        tp_size, pp_size = self._sizes
        ours = (
            payload.engine_id == self._engine_id
            and payload.dp_rank == 0
            and 0 <= payload.tp_rank < tp_size
            and 0 <= payload.pp_rank < pp_size
            and len(payload.addr) <= _MAX_ADDRESS
        )
        if not ours:
            raise mooncake_utils.HTTPException(status_code=400, detail="no worker of this engine")
        answer: dict[str, str] = await super().register_worker(payload)
        return answer


class DoorSocket(zmq.asyncio.Socket):
    """A socket of `DoorContext`. A ROUTER is bounded, and gives out messages of two parts only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[misc]
        if self.type == zmq.ROUTER:
            self.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            self.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
            self.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            self.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_MS)
            self.setsockopt(zmq.BACKLOG, 1024)

    async def recv_multipart(self, *args: Any, **kwargs: Any) -> list[bytes]:  # type: ignore[override]
        """The next message. vLLM decodes it and answers what it cannot decode with an error."""
        while True:
            parts: list[bytes] = await super().recv_multipart(*args, **kwargs)
            if self.type != zmq.ROUTER or len(parts) == 2:
                return parts
            cast(DoorContext, self.context).refused(len(parts))


class DoorContext(zmq.asyncio.Context):
    """For `MooncakeConnectorWorker.async_zmq_ctx`."""

    _socket_class = DoorSocket
    num_refused = 0

    def refused(self, num_parts: int) -> None:
        """One more message that no decode engine sends; logged at 1, 10, 100, ..."""
        self.num_refused += 1
        if str(self.num_refused).strip("0") == "1":
            logger.warning(
                "Mooncake side channel: %d messages are not a decode engine's, this one has %d parts",
                self.num_refused,
                num_parts,
            )
