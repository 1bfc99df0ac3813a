# SPDX-License-Identifier: Apache-2.0
"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Gloo's ports are closed on every platform, the rest is for machines without an accelerator. What their workers alone
need is in `host_platform`.
"""

from __future__ import annotations

import inspect
import time

_SHORTEST_SLEEP_S = 50e-6
_LONGEST_SLEEP_S = 1e-3
_IDLE_S = 0.05
"""Since the last message. From then on a reader waits for vLLM's notification of the next one."""
_RECENT_S = 1.0
_RECHECK_MS = 50
"""How often it looks itself until `_RECENT_S` all the same, should a notification have been dropped."""


def register() -> None:
    """Apply what every process of an engine needs. Idempotent, as vLLM asks of a plugin."""
    from vllm.platforms import current_platform

    from transport.in_engine.patches.gloo_listeners import close_after_connecting

    close_after_connecting()
    if current_platform.is_cpu():
        stop_spinning()


def stop_spinning() -> None:
    """Let readers of vLLM's shared-memory queues sleep a little between two looks.

    For a second after each message they look without a pause. With an engine of two such processes that is a core taken
    from the computation at every step, and from the other engines on the machine while this one only answers health
    probes. A sleep of an eighth of the time already waited adds at most that share to a step. vLLM's own notifications
    are no substitute at the rate of engine steps, where some of them are dropped; a reader that has waited for longer
    than a step has none before it that could drop the next, and sleeps until it comes.
    Source: vLLM 0.32 `device_communicators/shm_broadcast.py`, `SpinCondition`, which has no setting for it.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    if hasattr(SpinCondition, "_disagg_wait"):
        return
    wait = SpinCondition.wait
    if "current_time <= self.last_read + self.busy_loop_s" not in inspect.getsource(wait):
        raise RuntimeError("SpinCondition.wait of this vLLM is not the one that stop_spinning replaces; check it again")

    def resting_wait(self: SpinCondition, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = _IDLE_S
        waited = time.monotonic() - self.last_read
        if waited <= _IDLE_S:
            time.sleep(min(max(waited / 8, _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))
        elif waited <= _RECENT_S:
            wait(self, _RECHECK_MS if timeout_ms is None else min(timeout_ms, _RECHECK_MS))
        else:
            wait(self, timeout_ms)

    SpinCondition._disagg_wait = wait
    SpinCondition.wait = resting_wait
