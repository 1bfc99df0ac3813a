# SPDX-License-Identifier: Apache-2.0
"""What stands in for vLLM's code in the workers of a machine without an accelerator.

Each function takes what it replaces and returns what stands there instead. Where, why and until when is in `replaced`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def without_numa_nodes(original: object) -> Any:
    """`CpuPlatform.discover_numa_topology`: this machine has no node with cores to pin anything to."""

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


# A request with a seed whose prefill is chunked samples once a chunk and throws the token away. vLLM undoes the draw by
# rewinding the generator, which CPU generators cannot. Leaving it out would make the answer depend on the chunking, so
# the state before the draw is kept and set again.


def remembering(sample: Callable[..., Any]) -> Callable[..., Any]:
    """`GPUModelRunner._sample`, which first keeps the states of the generators whose draw is thrown away."""

    @functools.wraps(sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        self._disagg_states = {i: generators[i].get_state() for i in _discarded(self)} if generators else {}
        return sample(self, *args, **kwargs)

    return _sample


def restoring(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
    """`GPUModelRunner._bookkeeping_sync`, from which those generators are hidden, and set back afterwards."""

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
