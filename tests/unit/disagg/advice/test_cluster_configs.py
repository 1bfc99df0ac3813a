# SPDX-License-Identifier: Apache-2.0
"""The figures in the comments of the configs for GPU clusters, against the models, the GPUs and the YAML below them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGS = Path(__file__).parents[4] / "configs"
GIB = 1024**3
HEAD_DIM = 128
RESERVED_GIB = 5.0
GPU_GIB = {"H100": 79, "H200": 139}
"""What CUDA reports of the 80 and the 141 GB, rounded down."""


@dataclass(frozen=True)
class Model:
    """Shape and size from the model's config.json."""

    layers: int
    kv_heads: int
    weight_bytes: int


def dense(layers: int, hidden: int, intermediate: int, kv_heads: int, vocabulary: int = 128_256) -> Model:
    """A Llama in bfloat16, with an output matrix of its own."""
    attention = 2 * hidden * hidden + 2 * hidden * kv_heads * HEAD_DIM
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    return Model(layers, kv_heads, 2 * (layers * layer + 2 * vocabulary * hidden + hidden))


def qwen3_235b() -> Model:
    """94 layers of 64 query and 4 KV heads and 128 experts of width 1536: 8 bits; embeddings and router in bfloat16."""
    layer = 2 * 4096 * 64 * HEAD_DIM + 2 * 4096 * 4 * HEAD_DIM + 128 * 3 * 4096 * 1536
    rest = 2 * 151_936 * 4096 + 94 * (4096 * 128 + 2 * 4096 + 2 * HEAD_DIM) + 4096
    return Model(94, 4, 94 * layer + 2 * rest)


MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": dense(32, 4096, 14_336, 8),
    "meta-llama/Llama-3.3-70B-Instruct": dense(80, 8192, 28_672, 8),
    "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8": qwen3_235b(),
}
FILES = sorted(file for file in CONFIGS.glob("*.yaml") if "# tokens in HBM:" in file.read_text(encoding="utf-8"))


def figures(text: str) -> dict[str, float]:
    """The lines `# what: number` of a comment."""
    return {name: float(number) for name, number in re.findall(r"^# ([\w/ ]+): ([\d.]+)\b", text, re.MULTILINE)}


def read(file: Path) -> tuple[str, dict[str, Any], dict[str, int]]:
    """The text of a config, its `args`, and its numbers of replicas."""
    text = file.read_text(encoding="utf-8")
    (application,) = yaml.safe_load(text)["applications"]
    return text, application["args"], {entry["name"]: entry["num_replicas"] for entry in application["deployments"]}


def hardware(text: str) -> tuple[int, str, int]:
    """Nodes, the kind of their eight GPUs, and GiB of memory of each, from the first line."""
    found = re.match(r"# Hardware: (one|two) nodes? with 8 x (H\d00) .*?(\d+) GiB of memory", text)
    assert found is not None
    return {"one": 1, "two": 2}[found[1]], found[2], int(found[3])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_figures(file: Path) -> None:
    """Each figure follows from the model, the GPU and the settings."""
    text, args, sizes = read(file)
    nodes, gpu, _ = hardware(text)
    said, model = figures(text), MODELS[args["model"]["source"]]
    kwargs = args["model"]["engine_kwargs"]
    tp = kwargs.get("tensor_parallel_size", 1)
    per_token = 2 * model.layers * model.kv_heads * HEAD_DIM * 2
    weights = round(model.weight_bytes / GIB, 1)
    space = round(tp * (GPU_GIB[gpu] * kwargs["gpu_memory_utilization"] - RESERVED_GIB) - weights, 1)
    offload, l1 = args["offload"]["cpu_gib"], args["shared_cache"]["server"]["l1_gib"]
    engines = (sizes["prefill"] + sizes["decode"]) // nodes
    assert said == {
        "KV bytes per token": per_token,
        "weights of one engine": weights,
        "KV space of one engine": space,
        "tokens in HBM": int(space * GIB / per_token),
        "tokens in offload": offload * GIB // per_token,
        "tokens in L1": l1 * GIB // per_token,
        "/dev/shm of one node": engines * offload,
        "host memory of one node": engines * offload + l1,
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_fits(file: Path) -> None:
    """All GPUs are used, a prompt fits into HBM, and the tiers into the memory of the hosts that the file names."""
    text, args, sizes = read(file)
    nodes, _, host_gib = hardware(text)
    said, kwargs = figures(text), args["model"]["engine_kwargs"]
    engines = sizes["prefill"] + sizes["decode"]
    assert engines * kwargs.get("tensor_parallel_size", 1) == 8 * nodes
    assert said["tokens in HBM"] >= 2 * kwargs["max_model_len"]
    assert said["tokens in offload"] > said["tokens in HBM"]
    assert said["/dev/shm of one node"] <= host_gib / 2
    # The weights pass through the page cache once, and each engine's processes take memory of their own.
    assert said["host memory of one node"] + 300 <= host_gib


def test_there_is_one_for_each() -> None:
    """Both kinds of nodes, both transports and three kinds of models, with every model on two of them."""
    found = set()
    for file in FILES:
        text, args, _ = read(file)
        found.add((hardware(text)[1], args["transport"]["type"], args["model"]["id"]))
    assert {gpu for gpu, _, _ in found} == {"H100", "H200"}
    assert {(gpu, transport) for gpu, transport, _ in found} == {
        (gpu, transport) for gpu in ("H100", "H200") for transport in ("nixl", "mooncake")
    }
    for model in ("llama-3.1-8b", "llama-3.3-70b", "qwen3-235b-a22b"):
        assert {transport for _, transport, name in found if name == model} == {"nixl", "mooncake"}
