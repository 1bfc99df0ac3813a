# SPDX-License-Identifier: Apache-2.0
"""`lmcache server` with a queue that malformed messages do not end: `python -m pools.cache_server.main server ...`.

The thread that answers LMCache's message queue ends with the first message it cannot take apart (fewer than three
frames, or an operation that is no MessagePack), and the server answers nothing from then on. Anybody who reaches the
port can send one. Here the thread goes on with the next message, and the first such message is logged.

Source: `MessageQueueServer._main_loop` in `lmcache/v1/multiprocess/transport/zmq_impl/mq.py` 0.5.6.
"""

from __future__ import annotations

from pools.borrowed import BORROWED, MAIN_LOOP
from pools.cache_server.steadfast import steadfast
from pools.process.descriptors import raise_limit
from transport.upstream.guard import require
from transport.upstream.replacing import replace


def main() -> None:
    from lmcache.cli.main import main as lmcache_main

    raise_limit()
    require(BORROWED, "pools.cache_server.main")
    replace(MAIN_LOOP, steadfast)
    lmcache_main()


if __name__ == "__main__":
    main()
