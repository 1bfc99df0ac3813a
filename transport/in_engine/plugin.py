# SPDX-License-Identifier: Apache-2.0
"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in each of its processes.

It acts only where vLLM runs without an accelerator. What the workers alone need is in `host_platform`.
"""

from __future__ import annotations

_MAX_WAIT_MS = 50
"""Longest sleep on one notification, in case that vLLM's publish/subscribe socket dropped it."""


def register() -> None:
    """Apply what every process of a CPU engine needs. Idempotent, as vLLM asks of a plugin."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        stop_spinning()


def stop_spinning() -> None:
    """Let readers of vLLM's shared-memory queues sleep as soon as they find nothing.

    They poll without a pause for a second after each message. With an engine of two such processes that is a core
    taken from the computation, at every step, and from the other engine while this one only answers health probes.
    Source: vLLM 0.32 `device_communicators/shm_broadcast.py`, `SpinCondition`, which has no setting for it.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    if hasattr(SpinCondition, "_disagg_wait"):
        return
    wait = SpinCondition.wait

    def sleeping_wait(self: SpinCondition, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = 0
        wait(self, _MAX_WAIT_MS if timeout_ms is None else min(timeout_ms, _MAX_WAIT_MS))

    SpinCondition._disagg_wait = wait
    SpinCondition.wait = sleeping_wait
