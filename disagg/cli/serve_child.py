# SPDX-License-Identifier: Apache-2.0
"""`serve run CONFIG`, but Ctrl-C lets the applications finish what they carry before Serve ends.

`serve.shutdown` kills Serve's proxies at once, and with them every stream that goes through one, and gives up on
replicas after 30 s. Here the applications are deleted first, which drains them behind proxies that live on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from ray import serve
from ray.exceptions import RayError
from ray.serve import scripts

from pools.borrowed import BORROWED, SERVE_SHUTDOWN
from pools.replica.serve_details import details, end, to_come, without_place
from transport.upstream.guard import require
from transport.upstream.replacing import replace

_LOOK_S = 0.2


def main() -> None:
    """Arguments: the config file, and the seconds that running requests get."""
    config, drain_s = sys.argv[1], float(sys.argv[2])
    require(BORROWED, "disagg.cli.serve_child")

    def drained_first(at_once: Callable[[], None]) -> Callable[[], None]:
        def after_drain() -> None:
            drain(drain_s)
            at_once()

        return after_drain

    # `serve run` calls this function at its end, whatever ended it.
    replace(SERVE_SHUTDOWN, drained_first)
    sys.argv = ["serve", "run", config]
    scripts.cli()


def drain(timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Delete every application and wait until their replicas have ended, at most `timeout_s`. Never raises."""
    deadline = clock() + timeout_s
    try:
        for name in serve.status().applications:
            # Serve would wait for these as long as for a drain, and tells nothing of them once they are to go.
            unplaced = without_place(details(name))
            serve.delete(name, _blocking=False)
            # Before they are to go it would start others in their place.
            while to_come(details(name)) and clock() < deadline:
                time.sleep(_LOOK_S)
            end(unplaced)
        while serve.status().applications and clock() < deadline:
            time.sleep(_LOOK_S)
    except (RayError, RuntimeError, ValueError) as exc:
        # Without its controller Serve drains nothing; what is left is ended by force.
        print(f"the applications could not be drained: {exc}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
