# SPDX-License-Identifier: Apache-2.0
"""The thread that answers NIXL handshakes. It goes on whatever is sent to it.

vLLM's own thread ends with the first message that is not a handshake, such as that of a port scanner or of another
version. From then on every handshake with this engine times out, while `/health` is 200. vLLM's thread also queues
answers without bound for a peer that reads none, and takes messages of any size.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG
from vllm.utils.network_utils import is_valid_ipv6_address, make_zmq_path

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4096
"""A handshake takes about 20. zmq closes a connection on which a message is longer than this limit."""
HANDSHAKE_MS = 5000
"""zmq closes a connection that has not finished zmq's own greeting by then. zmq has no limit on connections."""
HEARTBEAT_MS = 30_000
"""zmq closes a connection whose peer does not answer a heartbeat that long."""
MAX_QUEUED = 64
"""Messages queued in each direction of a connection. Beyond it requests wait in the socket, and answers are dropped."""
_POLL_MS = 1000

Answerer = Callable[[list[bytes]], list[bytes] | None]
"""Takes the parts of one message as they came; returns the answer, or None for a message that it does not know."""


def listen(
    encoded_data: Mapping[tuple[int, int], bytes],
    ready: threading.Event,
    stop: threading.Event,
    host: str,
    port: int,
    *,
    also: Answerer | None = None,
) -> None:
    """Answer handshakes until `stop`; end at most a second after it. Sets `ready` once it listens, or has failed to.

    Args:
        encoded_data: the answer by (pipeline rank, tensor rank).
        also: asked for the answer to a message that is no handshake.
    """
    try:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as sock:
            _bind(sock, host, port)
            ready.set()
            _serve(sock, encoded_data, stop, also)
    finally:
        ready.set()


def _bind(sock: zmq.Socket[bytes], host: str, port: int) -> None:
    sock.linger = 0
    for option, value in (
        (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
        (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_MS),
        (zmq.RCVHWM, MAX_QUEUED),
        (zmq.SNDHWM, MAX_QUEUED),
        (zmq.BACKLOG, 1024),
        (zmq.IPV6, int(is_valid_ipv6_address(host))),
    ):
        sock.setsockopt(option, value)
    sock.bind(make_zmq_path("tcp", host, port))


def _serve(
    sock: zmq.Socket[bytes],
    encoded_data: Mapping[tuple[int, int], bytes],
    stop: threading.Event,
    also: Answerer | None,
) -> None:
    num_refused = 0
    while not stop.is_set():
        try:
            if not sock.poll(_POLL_MS):
                continue
            parts = sock.recv_multipart(zmq.NOBLOCK)
            answer = answer_to(parts, encoded_data)
            if answer is None and also is not None:
                answer = also(parts)
            if answer is None:
                num_refused += 1
                if str(num_refused).strip("0") == "1":
                    logger.warning("NIXL side channel: %d messages are no question and are not answered", num_refused)
                continue
            sock.send_multipart(answer, zmq.NOBLOCK)
        except zmq.Again:
            continue
        except zmq.ZMQError:
            # The peer is gone, or the system lacks a resource. Other peers still get their answers.
            logger.exception("NIXL side channel: a message could not be answered")
            stop.wait(0.1)


def answer_to(parts: Sequence[bytes], encoded_data: Mapping[tuple[int, int], bytes]) -> list[bytes] | None:
    """The answer to one message as it came, None for one that is no handshake with a rank of this engine.

    Its last part is this process' `time.perf_counter()`. From it the peer knows when leases end on its own clock.
    Source: vLLM 0.32 `NixlBaseConnectorScheduler._nixl_handshake_listener`.
    """
    if len(parts) != 3 or parts[1]:
        return None
    try:
        asked, pp_rank, tp_rank = msgspec.msgpack.decode(parts[2], type=tuple[bytes, int, int])
    except (msgspec.MsgspecError, RecursionError):
        return None
    metadata = encoded_data.get((pp_rank, tp_rank))
    if asked != GET_META_MSG or metadata is None:
        return None
    return [parts[0], b"", metadata, msgspec.msgpack.encode(time.perf_counter())]
