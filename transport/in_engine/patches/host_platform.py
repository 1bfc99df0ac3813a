# SPDX-License-Identifier: Apache-2.0
"""What stands in for vLLM's code in the workers of a machine without an accelerator.

Each function takes the original and returns what stands in its place. `replaced` says where, why and until when.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def without_numa_nodes(original: object) -> Any:
    """`CpuPlatform.discover_numa_topology` that finds no NUMA node, so that no process is pinned to a node's cores."""

    def discover_numa_topology(cls: type) -> list[list[int]]:
        return []

    return classmethod(discover_numa_topology)


def without_progress_thread(make_config: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """`nixl_agent_config` with another default. None where NIXL is not installed, as in vLLM's module."""
    if make_config is None:
        return None

    @functools.wraps(make_config)
    def quiet_config(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("enable_prog_thread", False)
        return make_config(*args, **kwargs)

    return quiet_config


# For a seeded request whose prefill is chunked, vLLM samples once in each chunk and throws the token away. vLLM undoes
# the draw by rewinding the generator, but CPU generators cannot rewind. If the draw stayed, the answer would depend on
# the chunking. So `remembering` keeps the state before the draw, and `restoring` sets it again.


def remembering(sample: Callable[..., Any]) -> Callable[..., Any]:
    """`GPUModelRunner._sample`, which first keeps the states of the generators whose draw is thrown away."""

    @functools.wraps(sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        self._disagg_states = {i: generators[i].get_state() for i in _discarded(self)} if generators else {}
        return sample(self, *args, **kwargs)

    return _sample


def restoring(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
    """`GPUModelRunner._bookkeeping_sync` without the generators that `remembering` kept; their states are set again."""

    @functools.wraps(bookkeeping)
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        states: dict[int, Any] = self.__dict__.pop("_disagg_states", {})
        generators = self.input_batch.generators
        held = {i: generators.pop(i) for i in states}
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            for i, generator in held.items():
                generator.set_state(states[i])
                generators[i] = generator

    return _bookkeeping_sync


def _discarded(runner: Any) -> list[int]:
    mask = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    return [i for i in mask.nonzero()[0].tolist() if i in runner.input_batch.generators]
