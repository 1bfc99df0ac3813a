# SPDX-License-Identifier: Apache-2.0
"""Mends what breaks vLLM on a machine without an accelerator. Loaded in the worker process only.

vLLM imports this module through its `worker_extension_cls` argument, which `pools.plan.launch` sets for
`platform: cpu` and never otherwise. Each fix states its cause and checks that the code it replaces still
looks as it did in vLLM 0.32, so that an upgrade fails at start and not in the middle of a request.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_MARK = "_disagg_host_fix"


def _require(source_of: object, fragment: str, fix: str) -> None:
    if fragment not in inspect.getsource(source_of):  # type: ignore[arg-type]
        raise RuntimeError(
            f"the host-platform fix {fix!r} does not fit this vLLM: {fragment!r} is gone. "
            "Check whether vLLM repaired it, then drop or adapt transport/in_engine/patches/host_platform.py."
        )


def unpin_worker() -> None:
    """Keep the NIXL worker from pinning the whole process to the last core of its NUMA node.

    Without it two engines on a small machine share one core and a 1 MB transfer takes seconds.
    Source: vLLM 0.32 `nixl/base_worker.py`, `rsv_cores_for_kv`, the only caller of `discover_numa_topology`.
    """
    if hasattr(CpuPlatform.discover_numa_topology, _MARK):
        return
    _require(base_worker, "current_platform.discover_numa_topology()", "unpin_worker")

    def discover_numa_topology(cls: type[CpuPlatform]) -> list[list[int]]:
        return []

    setattr(discover_numa_topology, _MARK, True)
    CpuPlatform.discover_numa_topology = classmethod(discover_numa_topology)


def stop_progress_thread() -> None:
    """Create the NIXL agent without its progress thread, which spins and takes a core an engine.

    The worker polls its transfers on every step, which drives UCX as well.
    Source: nixl 1.5 `nixl_agent_config(enable_prog_thread=True)`; vLLM 0.32 passes no value for it.
    """
    make_config = base_worker.nixl_agent_config
    if make_config is None or hasattr(make_config, _MARK):
        return
    _require(base_worker, "nixl_agent_config(num_threads=num_threads, capture_telemetry=True)", "stop_progress_thread")

    @functools.wraps(make_config)
    def quiet_config(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("enable_prog_thread", False)
        return make_config(*args, **kwargs)

    setattr(quiet_config, _MARK, True)
    base_worker.nixl_agent_config = quiet_config


def keep_seeded_generators() -> None:
    """Undo the draw of a discarded sample by restoring the generator's state instead of rewinding it.

    A request with a seed whose prefill is chunked samples once a chunk and throws the token away. vLLM then
    calls `set_offset`, which CPU generators do not have, and the EngineCore dies. Skipping the rewind would
    make the answer depend on the chunking.
    Source: vLLM 0.32 `GPUModelRunner._bookkeeping_sync`.
    """
    if hasattr(GPUModelRunner._sample, _MARK):
        return
    _require(GPUModelRunner._bookkeeping_sync, "gen.set_offset(gen.get_offset() - 4)", "keep_seeded_generators")
    GPUModelRunner._sample = _remembering(GPUModelRunner._sample)
    GPUModelRunner._bookkeeping_sync = _restoring(GPUModelRunner._bookkeeping_sync)


def _discarded(runner: Any) -> list[int]:
    mask = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    return [i for i in mask.nonzero()[0].tolist() if i in runner.input_batch.generators]


def _remembering(sample: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        self._disagg_states = {i: generators[i].get_state() for i in _discarded(self)} if generators else {}
        return sample(self, *args, **kwargs)

    setattr(_sample, _MARK, True)
    return _sample


def _restoring(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(bookkeeping)
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        states: dict[int, torch.Tensor] = self.__dict__.pop("_disagg_states", {})
        generators = self.input_batch.generators
        held = {i: generators.pop(i) for i in states}
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            for i, generator in held.items():
                generator.set_state(states[i])
                generators[i] = generator

    return _bookkeeping_sync


unpin_worker()
stop_progress_thread()
keep_seeded_generators()


class HostWorkerExtension:
    """Named as `worker_extension_cls`; importing its module is what applies the fixes."""
