# SPDX-License-Identifier: Apache-2.0
"""`lmcache server` with a queue that malformed messages do not end: `python -m pools.cache_server.main server ...`.

The thread that answers LMCache's message queue ends with the first message it cannot take apart (fewer than three
frames, or an operation that is no MessagePack), and the server answers nothing from then on. Anybody who reaches the
port can send one. Here the thread goes on with the next message, and the first such message is logged.

Source: `MessageQueueServer._main_loop` in `lmcache/v1/multiprocess/transport/zmq_impl/mq.py` 0.5.6.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import zmq
from lmcache.logging import init_logger

from pools.borrowed import BORROWED, MAIN_LOOP
from pools.process.descriptors import raise_limit
from transport.upstream.guard import require
from transport.upstream.replacing import replace

logger = init_logger(__name__)

Loop = Callable[[Any], None]


def steadfast(loop: Loop) -> Loop:
    """`loop` begun again after each exception: the message that caused it has been taken off the queue by then.

    A `zmq.ZMQError` is raised: it tells of the socket, not of a message, and would come again at once.
    """

    @functools.wraps(loop)
    def run(server: Any) -> None:
        num_refused = 0
        while True:
            try:
                return loop(server)
            except zmq.ZMQError:
                raise
            except Exception as exc:
                num_refused += 1
                if num_refused == 1:
                    logger.warning("a malformed message at the queue was refused (%r); others are not logged", exc)

    return run


def main() -> None:
    from lmcache.cli.main import main as lmcache_main

    raise_limit()
    require(BORROWED, "pools.cache_server.main")
    replace(MAIN_LOOP, steadfast)
    lmcache_main()


if __name__ == "__main__":
    main()
