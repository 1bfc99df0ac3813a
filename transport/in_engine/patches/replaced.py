# SPDX-License-Identifier: Apache-2.0
"""Every attribute of another package that is replaced inside an engine's processes. Data only.

On `platform: cuda` nothing is replaced: no entry names that platform. Our own engines alone are touched, wherever they
run. The plugin reads the platform from `PLATFORM_VARIABLE`, which a replica sets for its engine. Workers load the
extension that `pools.plan.launch` names.
"""

from __future__ import annotations

from transport.upstream.names import Replacement

_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_PATCHES = "transport.in_engine.patches"

NUMA_TOPOLOGY = Replacement(
    name="vllm.platforms.cpu:CpuPlatform.discover_numa_topology",
    by=f"{_PATCHES}.host_platform:without_numa_nodes",
    processes=frozenset({"worker"}),
    platforms=frozenset({"cpu"}),
    why="NIXL's worker pins the whole process to the last core of its NUMA node; two engines then share one core",
    source="vLLM 0.32 `nixl/base_worker.py`, `rsv_cores_for_kv`, the only caller",
    way_out="vLLM has a setting for the cores of KV transfers, or pins its threads alone",
)
NIXL_CONFIG = Replacement(
    name=f"{_V1}.nixl.base_worker:nixl_agent_config",
    by=f"{_PATCHES}.host_platform:without_progress_thread",
    processes=frozenset({"worker"}),
    platforms=frozenset({"cpu"}),
    why="the progress thread spins and takes a core an engine; the worker polls its transfers on every step anyway",
    source="nixl 1.5 `nixl_agent_config(enable_prog_thread=True)`; vLLM 0.32 passes no value for it",
    way_out="vLLM passes `enable_prog_thread` on from `kv_connector_extra_config`",
)
SAMPLE = Replacement(
    name="vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
    by=f"{_PATCHES}.host_platform:remembering",
    processes=frozenset({"worker"}),
    platforms=frozenset({"cpu"}),
    why="keeps the states of generators whose sample is thrown away, for `_bookkeeping_sync`",
    source="vLLM 0.32 `v1/worker/gpu_model_runner.py`",
    way_out="with `_bookkeeping_sync`",
)
BOOKKEEPING = Replacement(
    name="vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync",
    by=f"{_PATCHES}.host_platform:restoring",
    processes=frozenset({"worker"}),
    platforms=frozenset({"cpu"}),
    why="rewinds generators with `set_offset`, which those of CPUs lack: a seeded, chunked prompt ends EngineCore",
    source="vLLM 0.32 `GPUModelRunner._bookkeeping_sync`",
    way_out="vLLM restores the generator's state, or samples once a prompt",
)
SPINNING = Replacement(
    name="vllm.distributed.device_communicators.shm_broadcast:SpinCondition.wait",
    by=f"{_PATCHES}.spinning:resting",
    processes=frozenset({"api", "engine_core", "worker"}),
    platforms=frozenset({"cpu"}),
    why="readers of vLLM's queues spin for a second after each message and take a core from the computation",
    source="vLLM 0.32 `device_communicators/shm_broadcast.py`, which has no setting for it",
    way_out="vLLM has a setting for `busy_loop_s`, and its notifications are not dropped at the rate of steps",
)
QUEUE_NAMES = Replacement(
    name="vllm.distributed.device_communicators.shm_broadcast:MessageQueue.wait_until_ready",
    by=f"{_PATCHES}.nameless:nameless",
    processes=frozenset({"api", "engine_core", "worker"}),
    platforms=frozenset({"cpu"}),
    why="the files of vLLM's queues, 240 MiB each, stay in /dev/shm when the processes that made them are killed",
    source="vLLM 0.32 `device_communicators/shm_broadcast.py`, `ShmRingBuffer.__del__`, the only one to remove them",
    way_out="vLLM removes the name itself once all readers are there",
)
DEVICE_INDEX = Replacement(
    name="torch.accelerator:current_device_index",
    by="transport.in_engine.mooncake.connector:_device_index",
    processes=frozenset({"worker"}),
    platforms=frozenset({"cpu"}),
    of="a moment",
    why="torch raises where there is no accelerator, and vLLM's Mooncake worker asks while it is made",
    source="vLLM 0.32 `mooncake_connector.py`, `MooncakeConnectorWorker.__init__`",
    way_out="vLLM asks its platform for the device, as it does elsewhere",
)

REPLACED: tuple[Replacement, ...] = (
    NUMA_TOPOLOGY,
    NIXL_CONFIG,
    SAMPLE,
    BOOKKEEPING,
    SPINNING,
    QUEUE_NAMES,
    DEVICE_INDEX,
)
"""All of it."""
