# SPDX-License-Identifier: Apache-2.0
"""`disagg check`: every problem, where it is, and in words that say what to do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from disagg.advice.check import CheckReport, check_file, parse_args, validate_app
from disagg.advice.machine import Machine
from disagg.advice.paths import resolve
from disagg.config import AppConfig
from pools.plan.verdicts import Answer, Question, Verdict

ROOT = Path(__file__).parents[4]
KNOWN = ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "pipeline_parallel_size"]
KNOWN += ["block_size", "num_gpu_blocks_override", "gpu_memory_utilization", "dtype", "chat_template"]
KNOWN += ["enable_auto_tool_choice", "tool_call_parser", "worker_extension_cls"]
KNOWN += ["enable_prefix_caching", "speculative_config", "enable_expert_parallel", "reasoning_parser"]
KNOWN += ["prefix_caching_hash_algo", "runner", "uvicorn_log_level", "disable_hybrid_kv_cache_manager"]
GIB = 1024**3
MACHINE = Machine(num_cpus=8, memory_bytes=32 * GIB, port_trouble=lambda host, port: None, shm_bytes=16 * GIB)
LLAMA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "max_position_embeddings": 1_000_000,
}

Case = tuple[Callable[[dict[str, Any]], Any], str, str]


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """A config without problems, with a model and a key file on disk."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"x")
    (tmp_path / "key").write_text("secret\n")
    (tmp_path / "empty").write_text("\n")
    return {
        "http_options": {"host": "127.0.0.1"},
        "applications": [
            {
                "name": "disagg",
                "route_prefix": "/",
                "import_path": "disagg.app:build",
                "external_scaler_enabled": True,
                "args": {
                    "model": {"id": "tiny", "source": "./model", "engine_kwargs": {"max_model_len": 4096}},
                    "platform": "cpu",
                    "gateway": {"admin": {"key_file": "key"}},
                },
                "deployments": [{"name": name, "num_replicas": 1} for name in ("gateway", "prefill", "decode")],
            }
        ],
    }


def check(data: Any, tmp_path: Path, machine: Machine = MACHINE, **options: Any) -> CheckReport:
    file = tmp_path / "config.yaml"
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    options = {"installed": lambda module: True, "environment": {}, "ask": None, **options}
    return check_file(file, base_dir=tmp_path, machine=machine, known_kwargs=KNOWN, **options)


def args(**values: Any) -> Callable[[dict[str, Any]], None]:
    """A change of `args`; `__` in a name descends."""

    def change(data: dict[str, Any]) -> None:
        for name, value in values.items():
            *parents, last = name.split("__")
            here = data["applications"][0]["args"]
            for parent in parents:
                here = here.setdefault(parent, {})
            here[last] = value

    return change


def app(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["applications"][0].update(values)


def top(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(values)


def pool(index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["applications"][0]["deployments"][index].update(values)


def env(**values: Any) -> Callable[[dict[str, Any]], None]:
    return top(controller_options={"runtime_env": {"env_vars": values}})


def lmcache(*l2: dict[str, Any], sink: str = "unused", **server: Any) -> dict[str, Any]:
    return {"sink": sink, "server": {"type": "managed", "l2": list(l2), **server}}


def external(url: str, **server: Any) -> dict[str, Any]:
    return {"server": {"type": "external", "url": url, **server}}


A, D = "applications[0].args", "applications[0].deployments"
BAD: dict[str, Case] = {
    "unknown top key": (top(aplications=[]), "aplications", "did you mean 'applications'"),
    "no applications": (top(applications=[]), "applications", "missing or empty"),
    "two applications": (lambda d: d["applications"].append(d["applications"][0]), "applications", "holds 2"),
    "unknown http key": (top(http_options={"prot": 1}), "http_options.prot", "did you mean 'port'"),
    "port out of range": (top(http_options={"port": 70000}), "http_options.port", "1 to 65535"),
    "proxy location": (top(proxy_location="Everywhere"), "proxy_location", "EveryNode"),
    "env not a string": (env(X=1), "controller_options.runtime_env.env_vars.X", "is not a string"),
    "controller runtime_env": (
        top(controller_options={"runtime_env": {"pip": ["x"]}}),
        "controller_options.runtime_env.pip",
        "allowed: env_vars",
    ),
    "unknown application key": (app(arg={}), "applications[0].arg", "did you mean 'args'"),
    "import path": (app(import_path="disag.app:build"), "applications[0].import_path", "disagg.app:build"),
    "route prefix": (app(route_prefix="v1"), "applications[0].route_prefix", "a path from /"),
    "external scaler": (app(external_scaler_enabled="yes"), "applications[0].external_scaler_enabled", "true or false"),
    "args not a mapping": (app(args=[1]), A, "expected a mapping"),
    "deployment name": (pool(1, name="prefil"), f"{D}[1].name", "did you mean 'prefill'"),
    "deployment twice": (pool(1, name="decode"), f"{D}[2].name", "appears twice"),
    "deployment key": (pool(1, num_replica=2), f"{D}[1].num_replica", "did you mean 'num_replicas'"),
    "no replicas": (pool(1, num_replicas=0), f"{D}[1].num_replicas", "1 to 1024"),
    "replicas as text": (pool(1, num_replicas="two"), f"{D}[1].num_replicas", "not a pool size"),
    "autoscaling of a pool": (
        pool(1, num_replicas=None, autoscaling_config={"min_replicas": 1}),
        f"{D}[1].autoscaling_config",
        "nothing would act on it",
    ),
    "a pool's size left to Serve": (pool(2, num_replicas="auto"), f"{D}[2].num_replicas", "nothing would act on it"),
    "autoscaling with scaler": (
        pool(0, num_replicas=None, autoscaling_config={"min_replicas": 1}),
        f"{D}[0].autoscaling_config",
        "external_scaler_enabled",
    ),
    "auto with scaler": (pool(0, num_replicas="auto"), f"{D}[0].num_replicas", "external_scaler_enabled"),
    "autoscaling bounds": (
        pool(0, num_replicas=None, autoscaling_config={"min_replicas": 3, "max_replicas": 2}),
        f"{D}[0].autoscaling_config",
        "exceeds max_replicas",
    ),
    "unknown args key": (args(platfrom="cpu"), f"{A}.platfrom", "did you mean 'platform'"),
    "pool size in args": (args(prefill__num_replicas=2), f"{A}.prefill.num_replicas", "deployments[]"),
    "pool's own model": (args(decode__model="other"), f"{A}.decode.model", "same model"),
    "pool's own model in kwargs": (
        args(decode__engine_kwargs={"model": "x"}),
        f"{A}.decode.engine_kwargs.model",
        "same",
    ),
    "vLLM argument beside kwargs": (args(decode__swap_space=4), f"{A}.decode.swap_space", "into engine_kwargs"),
    "shared argument in pool": (
        args(decode__engine_kwargs={"dtype": "half"}),
        f"{A}.decode.engine_kwargs.dtype",
        "both pools",
    ),
    "binary data": (
        args(model__engine_kwargs={"dtype": [{"x": b"\x00\xff"}]}),
        f"{A}.model.engine_kwargs.dtype[0].x",
        "binary data",
    ),
    "reserved argument": (args(model__engine_kwargs={"port": 1}), f"{A}.model.engine_kwargs.port", "kernel chooses"),
    "pages for an engine": (
        args(decode__engine_kwargs={"allowed_origins": ["*"]}),
        f"{A}.decode.engine_kwargs.allowed_origins",
        "set gateway.cors.allow_origins",
    ),
    "key for an engine": (
        args(model__engine_kwargs={"api_key": ["x"]}),
        f"{A}.model.engine_kwargs.api_key",
        "set gateway.api_keys",
    ),
    "certificate for an engine": (
        args(model__engine_kwargs={"ssl_certfile": "x.pem"}),
        f"{A}.model.engine_kwargs.ssl_certfile",
        "set http_options.ssl_certfile",
    ),
    "adapters": (
        args(model__engine_kwargs={"lora_modules": ["a=b"]}),
        f"{A}.model.engine_kwargs.lora_modules",
        "no client can ask for an adapter",
    ),
    "engines without chat": (
        args(decode__engine_kwargs={"runner": "pooling"}),
        f"{A}.decode.engine_kwargs.runner",
        "'pooling' makes no chat",
    ),
    "no length at all": (
        args(model__engine_kwargs={"max_model_len": 0}),
        f"{A}.model.engine_kwargs.max_model_len",
        "from 1, or -1",
    ),
    "random keys on disk": (
        args(
            model__engine_kwargs={"prefix_caching_hash_algo": "xxhash", "max_model_len": 4096},
            offload={"cpu_gib": 1, "disk": {"path": "kv"}},
        ),
        f"{A}.model.engine_kwargs.prefix_caching_hash_algo",
        "'xxhash' does not go with offload.disk",
    ),
    "random keys of another kind on disk": (
        args(
            model__engine_kwargs={"prefix_caching_hash_algo": "xxhash_cbor", "max_model_len": 4096},
            offload={"cpu_gib": 1, "disk": {"path": "kv"}},
        ),
        f"{A}.model.engine_kwargs.prefix_caching_hash_algo",
        "allowed: sha256, sha256_cbor",
    ),
    "unknown argument": (
        args(model__engine_kwargs={"max_modle_len": 1}),
        f"{A}.model.engine_kwargs.max_modle_len",
        "did you mean 'max_model_len'",
    ),
    "missing model": (lambda d: d["applications"][0]["args"].pop("model"), f"{A}.model", "is missing"),
    "missing source": (args(model={"id": "x"}), f"{A}.model.source", "is missing"),
    "empty id": (args(model__id=""), f"{A}.model.id", "is empty"),
    "platform": (args(platform="tpu"), f"{A}.platform", "'cpu' or 'cuda'"),
    "transport type": (args(transport={"type": "nixll"}), f"{A}.transport.type", "'nixl'"),
    "engine type": (args(engine={"type": "sglang"}), f"{A}.engine.type", "'vllm', 'fake'"),
    "engine type missing": (args(engine={"itl_ms": 2}), f"{A}.engine.type", "is missing"),
    "key of another engine": (args(engine={"type": "fake", "itl": 2}), f"{A}.engine.itl", "did you mean 'itl_ms'"),
    "value of an engine": (args(engine={"type": "fake", "itl_ms": -1}), f"{A}.engine.itl_ms", "0.0 or more"),
    "half a GiB": (args(cpu__kv_cache_gib=0.5), f"{A}.cpu.kv_cache_gib", "whole number"),
    "zero threads": (args(cpu__omp_threads=0), f"{A}.cpu.omp_threads", "too small"),
    "duration as text": (args(gateway__connect_timeout_s="2s"), f"{A}.gateway.connect_timeout_s", "expected a number"),
    "zero duration": (args(decode__drain_timeout_s=0), f"{A}.decode.drain_timeout_s", "more than 0"),
    "backends as text": (args(transport={"type": "nixl", "backends": "UCX"}), f"{A}.transport.backends", "a list"),
    "unknown routing policy": (
        args(gateway__routing={"policy": "fastest"}),
        f"{A}.gateway.routing.policy",
        "'least_loaded' or 'round_robin'",
    ),
    "short lease": (args(gateway__connect_timeout_s=40), A, "kv_lease_duration_s"),
    "cpu settings on cuda": (args(platform="cuda", cpu={"omp_threads": 2}), A, "no effect"),
    "worker extension on cpu": (args(decode__engine_kwargs={"worker_extension_cls": "a.B"}), A, "worker_extension_cls"),
    "model directory missing": (args(model__source="./nope"), f"{A}.model.source", "not a directory"),
    "model without config": (args(model__source=".."), f"{A}.model.source", "no config.json"),
    "empty key file": (args(gateway__admin={"key_file": "empty"}), f"{A}.gateway.admin.key_file", "is empty"),
    "tp does not divide heads": (
        args(decode__engine_kwargs={"tensor_parallel_size": 3}),
        f"{A}.decode.engine_kwargs.tensor_parallel_size",
        "allowed: 1, 2, 4",
    ),
    "tp as text": (
        args(model__engine_kwargs={"tensor_parallel_size": "2"}),
        f"{A}.model.engine_kwargs.tensor_parallel_size",
        "a whole number from 1",
    ),
    "tp beyond cores": (
        args(model__engine_kwargs={"tensor_parallel_size": 4}, cpu={"omp_threads": 4}),
        f"{A}.model.engine_kwargs.tensor_parallel_size",
        "this machine has 8",
    ),
    "tp that does not line up": (
        args(prefill__engine_kwargs={"tensor_parallel_size": 3}, decode__engine_kwargs={"tensor_parallel_size": 2}),
        f"{A}.decode.engine_kwargs.tensor_parallel_size",
        "multiple of the other",
    ),
    "pipeline in decode": (
        args(decode__engine_kwargs={"pipeline_parallel_size": 2}),
        f"{A}.decode.engine_kwargs.pipeline_parallel_size",
        "pipeline stages",
    ),
    "batched tokens below seqs": (
        args(decode__engine_kwargs={"max_num_batched_tokens": 8, "max_num_seqs": 16}),
        f"{A}.decode.engine_kwargs.max_num_batched_tokens",
        "16 or more",
    ),
    "memory share": (
        args(prefill__engine_kwargs={"gpu_memory_utilization": 90}),
        f"{A}.prefill.engine_kwargs.gpu_memory_utilization",
        "at most 1",
    ),
    "length beyond the model": (
        args(model__engine_kwargs={"max_model_len": 2_000_000}),
        f"{A}.model.engine_kwargs.max_model_len",
        "at most 1000000",
    ),
    "length beyond KV space": (
        args(model__engine_kwargs={"max_model_len": 600_000}),
        f"{A}.cpu.kv_cache_gib",
        "KV space for 524288 tokens",
    ),
    "blocks override too small": (
        args(decode__engine_kwargs={"num_gpu_blocks_override": 8}),
        f"{A}.decode.engine_kwargs.num_gpu_blocks_override",
        "1024 tokens",
    ),
    "memory": (args(cpu={"kv_cache_gib": 20}), f"{A}.cpu.kv_cache_gib", "this machine has 32.0 GiB"),
    "offload beyond memory": (args(offload={"cpu_gib": 14}), f"{A}.offload.cpu_gib", "2 engines x 14 GiB offload"),
    "L1 beyond memory": (
        args(offload={"cpu_gib": 10}, shared_cache=lmcache(l1_gib=6)),
        f"{A}.shared_cache.server.l1_gib",
        "lmcache server 6.6 GiB), this machine has 32.0 GiB",
    ),
    "Mooncake store beyond memory": (
        args(
            shared_cache=lmcache(
                {
                    "type": "mooncake_store",
                    "master_server_address": "a:1",
                    "metadata_server": "P2PHANDSHAKE",
                    "segment_gib": 24,
                }
            )
        ),
        f"{A}.shared_cache.server.l1_gib",
        "lmcache server 25.6 GiB",
    ),
    "L1 beyond /dev/shm": (
        args(shared_cache=lmcache(l1_gib=16)),
        f"{A}.shared_cache.server.l1_gib",
        "needs 16.25 GiB of /dev/shm",
    ),
    "disk tier beyond /dev/shm": (
        args(offload={"cpu_gib": 9, "disk": {"path": "kv"}}),
        f"{A}.offload.cpu_gib",
        "2 engines x 9 GiB offload), this machine's has 16.00 GiB",
    ),
    "offload below one block": (
        args(offload={"cpu_gib": 0.0001}),
        f"{A}.offload.cpu_gib",
        "holds 52 tokens, not one piece of 128",
    ),
    "L1 below one chunk": (
        args(shared_cache=lmcache(l1_gib=0.0001)),
        f"{A}.shared_cache.server.l1_gib",
        "not one piece of 256",
    ),
    "chunk of LMCache": (
        args(shared_cache=lmcache(chunk_tokens=192)),
        f"{A}.shared_cache.server.chunk_tokens",
        "KV block of 128 tokens, vLLM's default on cpu; allowed: a multiple of 128",
    ),
    "chunk of LMCache against a given block": (
        args(model__engine_kwargs={"block_size": 96, "max_model_len": 4096}, shared_cache=lmcache()),
        f"{A}.shared_cache.server.chunk_tokens",
        "256 is not a multiple of the engines' KV block of 96 tokens; allowed",
    ),
    "chunk of an external server": (
        args(shared_cache=external("tcp://127.0.0.1:5555", chunk_tokens=100)),
        f"{A}.shared_cache.server.chunk_tokens",
        "100 is not a multiple",
    ),
    "pieces of offload": (
        args(offload={"cpu_gib": 1, "block_tokens": 64}),
        f"{A}.offload.block_tokens",
        "64 is not a multiple",
    ),
    "threshold with disk": (
        args(offload={"cpu_gib": 1, "store_threshold": 2, "disk": {"path": "kv"}}),
        f"{A}.offload.store_threshold",
        "2 does not go with disk",
    ),
    "tiers without prefix caching": (
        args(
            model__engine_kwargs={"enable_prefix_caching": False, "max_model_len": 4096},
            offload={"cpu_gib": 1},
            shared_cache=lmcache(),
        ),
        f"{A}.model.engine_kwargs.enable_prefix_caching",
        "does not go with offload and shared_cache",
    ),
    "two tiers in one directory": (
        args(offload={"cpu_gib": 1, "disk": {"path": "kv"}}, shared_cache=lmcache({"type": "fs", "path": "kv"})),
        f"{A}.shared_cache.server.l2[0].path",
        "offload.disk already",
    ),
    "disk below a file": (
        args(offload={"cpu_gib": 1, "disk": {"path": "key/kv"}}),
        f"{A}.offload.disk.path",
        "key' is not a directory",
    ),
    "L2 below a file": (
        args(shared_cache=lmcache({"type": "resp", "host": "h"}, {"type": "fs", "path": "./key/kv"})),
        f"{A}.shared_cache.server.l2[1].path",
        "key' is not a directory",
    ),
    "rdma without device": (
        args(transport={"type": "mooncake", "protocol": "rdma"}),
        f"{A}.transport.device_name",
        "ibv_devices",
    ),
    "device without rdma": (
        args(transport={"type": "mooncake", "device_name": "mlx5_0"}),
        f"{A}.transport.device_name",
        "no effect with protocol tcp",
    ),
    "rdma without device in the store": (
        args(
            shared_cache=lmcache(
                {
                    "type": "mooncake_store",
                    "master_server_address": "a:1",
                    "metadata_server": "P2PHANDSHAKE",
                    "protocol": "rdma",
                }
            )
        ),
        f"{A}.shared_cache.server.l2[0].device_name",
        "ibv_devices",
    ),
    "key of another transport": (
        args(transport={"type": "mooncake", "backends": ["UCX"]}),
        f"{A}.transport.backends",
        "unknown key",
    ),
    "short lease of Mooncake": (
        args(transport={"type": "mooncake", "kv_lease_duration_s": 3}),
        f"{A}.transport.kv_lease_duration_s",
        "6 or more",
    ),
    "lease of Mooncake below the connect time": (
        args(transport={"type": "mooncake"}, gateway__connect_timeout_s=40),
        A,
        "kv_lease_duration_s",
    ),
    "external server without scheme": (
        args(shared_cache=external("127.0.0.1:5555")),
        f"{A}.shared_cache.server.url",
        "tcp://host:port",
    ),
    "external server without port": (
        args(shared_cache=external("tcp://127.0.0.1")),
        f"{A}.shared_cache.server.url",
        "tcp://host:port",
    ),
    "external server with a port that is none": (
        args(shared_cache=external("tcp://127.0.0.1:70000")),
        f"{A}.shared_cache.server.url",
        "1 to 65535",
    ),
    "external server's HTTP address": (
        args(shared_cache=external("tcp://127.0.0.1:5555", http_url="127.0.0.1:80")),
        f"{A}.shared_cache.server.http_url",
        "http://",
    ),
    "engine that is replaced before it is suspect": (
        args(decode__hang_after_s=20, decode__health_probe_timeout_s=20),
        f"{A}.decode.hang_after_s",
        "less than health_probe_timeout_s (20); lower it, or raise health_probe_timeout_s",
    ),
    "engine that is replaced before it is suspect by default": (
        args(decode__health_probe_timeout_s=5),
        f"{A}.decode.health_probe_timeout_s",
        "more than hang_after_s (5 unless set); raise it, or lower hang_after_s",
    ),
    "server that may block until prefill is suspect": (
        args(shared_cache={"mq_timeout_s": 3}, prefill__hang_after_s=6),
        f"{A}.prefill.hang_after_s",
        "more than 6, or unset; raise or remove it, or lower shared_cache.mq_timeout_s",
    ),
    "server that may block for as long as a probe of decode": (
        args(shared_cache={"mq_timeout_s": 10}, decode__health_probe_timeout_s=21),
        f"{A}.decode.health_probe_timeout_s",
        "more than 21 (decode.hang_after_s), or unset; raise or remove it, or lower shared_cache.mq_timeout_s",
    ),
    "one directory for two tiers": (
        args(offload={"cpu_gib": 1, "disk": {"path": "kv"}}, shared_cache=lmcache({"type": "fs", "path": "kv"})),
        f"{A}.shared_cache.server.l2[0].path",
        "is the directory of offload.disk already",
    ),
    "one directory, spelled twice": (
        args(
            offload={"cpu_gib": 1, "disk": {"path": "kv"}}, shared_cache=lmcache({"type": "fs", "path": "./x/../kv/"})
        ),
        f"{A}.shared_cache.server.l2[0].path",
        "kv' is the same as the directory of another tier",
    ),
    "directory inside another tier's": (
        args(
            offload={"cpu_gib": 1, "disk": {"path": "kv"}}, shared_cache=lmcache({"type": "fs", "path": "kv/../kv/l2"})
        ),
        f"{A}.shared_cache.server.l2[0].path",
        "kv/l2' is inside the directory",
    ),
    "directory around another tier's": (
        args(
            offload={"cpu_gib": 1, "disk": {"path": "/mnt/kv/disk"}},
            shared_cache=lmcache({"type": "fs", "path": "/mnt//kv"}),
        ),
        f"{A}.shared_cache.server.l2[0].path",
        "'/mnt/kv' is around the directory",
    ),
    "one directory for two L2": (
        args(shared_cache=lmcache({"type": "fs", "path": "a/kv"}, {"type": "fs", "path": "./a/kv"})),
        f"{A}.shared_cache.server.l2[1].path",
        "is the same as the directory",
    ),
    "server type missing": (args(shared_cache={"server": {"l1_gib": 2}}), f"{A}.shared_cache.server.type", "missing"),
    "same ports": (
        args(shared_cache=lmcache(port=5555, http_port=5555)),
        f"{A}.shared_cache.server.http_port",
        "5555 is the port for the engines",
    ),
    "sink": (args(shared_cache=lmcache(sink="lazy")), f"{A}.shared_cache.sink", "'off', 'write_through'"),
    "L2 type": (args(shared_cache=lmcache({"type": "redis"})), f"{A}.shared_cache.server.l2[0].type", "'resp'"),
    "size of a tier": (args(offload={"cpu_gib": 0}), f"{A}.offload.cpu_gib", "more than 0"),
    "two passwords": (
        args(
            shared_cache=lmcache(
                {"type": "resp", "host": "h", "password_env": "A"}, {"type": "resp", "host": "i", "password_env": "B"}
            )
        ),
        f"{A}.shared_cache.server.l2[1].password_env",
        "one password",
    ),
    "vLLM's own offloading": (
        args(model__engine_kwargs={"kv_offloading_size": 8}),
        f"{A}.model.engine_kwargs.kv_offloading_size",
        "set offload",
    ),
    "vLLM's own offloading to LMCache": (
        args(model__engine_kwargs={"kv_offloading_backend": "lmcache"}),
        f"{A}.model.engine_kwargs.kv_offloading_backend",
        "set shared_cache",
    ),
    "Ray CPUs": (args(cpu={"num_cpus": 5}), f"{A}.cpu.num_cpus", "reserve 10.1 Ray CPUs"),
}


def test_good(base: dict[str, Any], tmp_path: Path) -> None:
    """A sound config has no problems, and the report says what will run."""
    report = check(base, tmp_path)
    assert report.problems == ()
    assert (report.ok, report.url) == (True, "http://127.0.0.1:8000")
    assert [deployment.name for deployment in report.deployments] == ["gateway", "prefill", "decode"]
    text = report.render()
    assert "VLLM_NIXL_SIDE_CHANNEL_PORT=<free port>" in text
    assert '"kv_role": "kv_consumer"' in text
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True


@pytest.mark.parametrize(
    "change",
    [
        args(shared_cache={"mq_timeout_s": 10}),
        args(shared_cache={"mq_timeout_s": 40}),
        args(shared_cache={"mq_timeout_s": 40}, prefill__hang_after_s=80.5, decode__health_probe_timeout_s=82),
        args(offload={"cpu_gib": 1, "disk": {"path": "kv"}}, shared_cache=lmcache({"type": "fs", "path": "kv2"})),
    ],
    ids=["default times", "long times", "long times written down", "directories side by side"],
)
def test_tiers_that_fit(change: Callable[[dict[str, Any]], None], base: dict[str, Any], tmp_path: Path) -> None:
    """What is just right is no problem."""
    change(base)
    assert check(base, tmp_path).problems == ()


SEEDED = {"model__engine_kwargs": {"prefix_caching_hash_algo": "xxhash", "max_model_len": 4096}}
ON_DISK = {"offload": {"cpu_gib": 1, "disk": {"path": "kv"}}}


@pytest.mark.parametrize(
    ("change", "environment"),
    [
        (args(**SEEDED), {}),
        (args(**SEEDED, offload={"cpu_gib": 1}), {}),
        (args(**SEEDED, shared_cache=lmcache()), {}),
        (args(**SEEDED, **ON_DISK), {"PYTHONHASHSEED": "7"}),
    ],
    ids=["no tier", "host memory", "LMCache", "a common seed"],
)
def test_random_keys_that_hurt_nobody(
    change: Callable[[dict[str, Any]], None], environment: dict[str, str], base: dict[str, Any], tmp_path: Path
) -> None:
    """Host memory ends with its process, LMCache hashes tokens itself, and a common seed makes keys alike."""
    change(base)
    assert check(base, tmp_path, environment=environment).problems == ()


def test_a_common_seed_in_the_file(base: dict[str, Any], tmp_path: Path) -> None:
    """The seed may stand in the application's runtime_env, which reaches every replica."""
    args(**SEEDED, **ON_DISK)(base)
    app(runtime_env={"env_vars": {"PYTHONHASHSEED": "7"}})(base)
    assert check(base, tmp_path).problems == ()


def test_values_that_vllm_refuses(base: dict[str, Any], tmp_path: Path) -> None:
    """vLLM is asked once, about both pools and what is not known to be wrong, and its verdicts are problems."""
    args(
        model__engine_kwargs={"max_model_len": 4096, "dtype": "bf16"},
        decode__engine_kwargs={"max_num_seqs": 0},
    )(base)
    asked: list[Question] = []

    def ask(question: Question, env: Mapping[str, str]) -> Answer:
        asked.append(question)
        wrong = [Verdict(pool=name, argument="dtype", kind="raised", message="no") for name in question.pools]
        return Answer(verdicts=tuple(wrong), unjudged=("something, for a reason",))

    report = check(base, tmp_path, ask=ask)
    (question,) = asked
    assert [pool.given for pool in question.pools.values()] == [{"max_model_len": 4096, "dtype": "bf16"}] * 2
    assert [problem.path for problem in report.problems] == [
        f"{A}.decode.engine_kwargs.max_num_seqs",
        f"{A}.model.engine_kwargs.dtype",
    ]
    assert report.not_checked == "something, for a reason"
    assert "not checked: something, for a reason" in report.render()


@pytest.mark.parametrize(
    "change",
    [
        args(model__engine_kwargs={"max_model_len": 2_000_000, "hf_overrides": {"max_position_embeddings": 4_000_000}}),
        lambda data: (
            args(model__engine_kwargs={"max_model_len": 2_000_000})(data),
            app(runtime_env={"env_vars": {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}})(data),
        ),
        args(model__engine_kwargs={"max_model_len": 4096, "load_format": "tensorizer"}),
    ],
    ids=["overrides", "a variable of the engines", "weights elsewhere"],
)
def test_what_vllm_takes_is_not_refused(
    change: Callable[[dict[str, Any]], None], base: dict[str, Any], tmp_path: Path
) -> None:
    """A length beyond the model's own, and weights that are no files of its directory."""
    change(base)
    if "load_format" in base["applications"][0]["args"]["model"]["engine_kwargs"]:
        for file in (tmp_path / "model").glob("*.safetensors"):
            file.unlink()
    report = check(base, tmp_path, machine=replace(MACHINE, memory_bytes=900 * GIB))
    assert [p.text() for p in report.problems if p.path.endswith(("max_model_len", "source"))] == []


def test_variables_of_the_application_reach_the_judge(base: dict[str, Any], tmp_path: Path) -> None:
    """Engines have them, too; and the report has them for whoever starts it."""
    asked: list[Mapping[str, str]] = []

    def ask(question: Question, env: Mapping[str, str]) -> str:
        asked.append(env)
        return "no"

    app(runtime_env={"env_vars": {"VLLM_SOMETHING": "1"}})(base)
    report = check(base, tmp_path, ask=ask)
    assert [env["VLLM_SOMETHING"] for env in asked] == ["1"]
    assert report.environment == {"VLLM_SOMETHING": "1"}


def test_a_question_without_an_answer_is_told_of(base: dict[str, Any], tmp_path: Path) -> None:
    """When vLLM could not be asked, the report says so and is otherwise the same."""
    report = check(base, tmp_path, ask=lambda question, env: "the process ended with code 1: out of memory")
    assert report.ok
    assert report.not_checked == "values in engine_kwargs: the process ended with code 1: out of memory"


@pytest.mark.parametrize(
    "change",
    [args(engine={"type": "fake"}), args(model__engine_kwargs={})],
    ids=["a fake engine", "no arguments"],
)
def test_when_nobody_is_asked(change: Callable[[dict[str, Any]], None], base: dict[str, Any], tmp_path: Path) -> None:
    """No process is started for a fake engine, or for a config that gives vLLM no arguments."""
    change(base)
    report = check(base, tmp_path, ask=lambda question, env: pytest.fail("vLLM was asked"))
    assert report.config is not None
    assert report.not_checked is None


@pytest.mark.parametrize("name", BAD)
def test_bad(name: str, base: dict[str, Any], tmp_path: Path) -> None:
    """Each mistake is an error at its own path, in words that name what is allowed or what to do."""
    change, path, words = BAD[name]
    change(base)
    report = check(base, tmp_path)
    found = [str(problem) for problem in report.problems if problem.path == path and problem.severity == "error"]
    assert any(words in text for text in found), "\n".join(map(str, report.problems)) or "no problem found"
    assert not report.ok
    assert "\n" not in "".join(map(str, report.problems))
    json.dumps(report.as_dict())
    report.render()


WARNED: dict[str, Case] = {
    "no scaler": (app(external_scaler_enabled=False), "applications[0].external_scaler_enabled", "cannot be scaled"),
    "own bundles": (pool(1, placement_group_bundles=[{"CPU": 1}]), f"{D}[1].placement_group_bundles", "derives"),
    "own GPUs": (pool(1, ray_actor_options={"num_gpus": 1}), f"{D}[1].ray_actor_options.num_gpus", "derives"),
    "short drain": (pool(2, graceful_shutdown_timeout_s=20), f"{D}[2].graceful_shutdown_timeout_s", "cuts a drain"),
    "no key file": (args(gateway={}), f"{A}.gateway.admin.key_file", "403"),
    "key file missing": (args(gateway__admin={"key_file": "nope"}), f"{A}.gateway.admin.key_file", "cannot read"),
    "block size": (
        args(model__engine_kwargs={"block_size": 16, "max_model_len": 4096}),
        f"{A}.model.engine_kwargs.block_size",
        "slow on CPU",
    ),
    "HAProxy hard stop": (
        env(RAY_SERVE_ENABLE_HA_PROXY="1"),
        "controller_options.runtime_env.env_vars.RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S",
        "120 s",
    ),
    "pipeline in prefill": (
        args(prefill__engine_kwargs={"pipeline_parallel_size": 2}),
        f"{A}.prefill.engine_kwargs.pipeline_parallel_size",
        "untested",
    ),
    "ranks with NIXL push": (
        args(
            decode__engine_kwargs={"tensor_parallel_size": 2},
            transport={"type": "nixl", "mode": "push"},
        ),
        f"{A}.decode.engine_kwargs.tensor_parallel_size",
        "NIXL push between engines of several ranks is untested",
    ),
    "pipeline with Mooncake": (
        args(decode__engine_kwargs={"pipeline_parallel_size": 2}, transport={"type": "mooncake"}),
        f"{A}.decode.engine_kwargs.pipeline_parallel_size",
        "Mooncake hand-off with an engine in pipeline stages is untested",
    ),
    "offload below one prompt": (
        args(offload={"cpu_gib": 0.005}),
        f"{A}.offload.cpu_gib",
        "holds 2621 tokens, less than one prompt of max_model_len (4096); allowed: 0.01 or more",
    ),
    "L1 below one prompt": (
        args(shared_cache=lmcache(l1_gib=0.005)),
        f"{A}.shared_cache.server.l1_gib",
        "less than one prompt",
    ),
    "other ranks in decode": (
        args(decode__engine_kwargs={"tensor_parallel_size": 2}, shared_cache=lmcache()),
        f"{A}.shared_cache",
        "never find what prefill engines stored",
    ),
    "speculative decoding with a tier": (
        args(
            model__engine_kwargs={"speculative_config": {"method": "ngram"}, "max_model_len": 4096},
            offload={"cpu_gib": 1},
        ),
        f"{A}.model.engine_kwargs.speculative_config",
        "untested",
    ),
    "password not here": (
        args(shared_cache=lmcache({"type": "resp", "host": "h", "password_env": "KV_PASSWORD"})),
        f"{A}.shared_cache.server.l2[0].password_env",
        "KV_PASSWORD is not set",
    ),
    "a log that nobody writes": (
        args(decode__engine_kwargs={"uvicorn_log_level": "debug"}),
        f"{A}.decode.engine_kwargs.uvicorn_log_level",
        "has no effect: a replica's server writes no access log",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_warned(name: str, base: dict[str, Any], tmp_path: Path) -> None:
    """What may be meant is a warning and does not stop the start."""
    change, path, words = WARNED[name]
    change(base)
    report = check(base, tmp_path)
    assert any(p.path == path and words in str(p) and p.severity == "warning" for p in report.problems)
    assert report.ok


TIERS = args(
    transport={"type": "mooncake"},
    offload={"cpu_gib": 1.5, "disk": {"path": "kv/disk"}},
    shared_cache=lmcache(
        {"type": "fs", "path": "./kv/l2"},
        {"type": "resp", "host": "cache", "password_env": "KV_PASSWORD"},
        l1_gib=2,
        http_port=8080,
    ),
)


def test_tiers_are_shown(base: dict[str, Any], tmp_path: Path) -> None:
    """A sound config with every tier has no problems; the report has sizes, tokens and the server's command."""
    TIERS(base)
    pool(2, num_replicas=2)(base)
    report = check(base, tmp_path, environment={"KV_PASSWORD": "hunter-2"})
    assert report.problems == ()
    offload, shared = report.tiers
    assert (offload.name, offload.gib_each, offload.gib_total) == ("offload", 1.5, 4.5)
    assert offload.tokens_each == 1.5 * GIB // 2048
    assert (shared.name, shared.gib_each, shared.tokens_each) == ("shared_cache", 2, 2 * GIB // 2048)
    text = report.render()
    assert f"disk: {tmp_path}/kv/disk" in text
    assert f"L2 0: fs path={tmp_path}/kv/l2" in text
    assert "--port <free port> --http-host" in text and "--http-port 8080" in text
    assert '"lmcache.mp.port": "<free port>"' in text
    assert "hunter-2" not in text + json.dumps(report.as_dict())
    assert [tier["name"] for tier in report.as_dict()["tiers"]] == ["offload", "shared_cache"]


def test_an_external_server_is_shown(base: dict[str, Any], tmp_path: Path) -> None:
    """Of a server that somebody else runs the report gives the address and no command."""
    args(shared_cache=external("tcp://127.0.0.1:5555"))(base)
    (tier,) = check(base, tmp_path).tiers
    assert (tier.command, tier.gib_each) == ((), None)
    assert "tcp://127.0.0.1:5555" in tier.summary


def test_tiers_of_a_fake_engine_are_not_judged(base: dict[str, Any], tmp_path: Path) -> None:
    """A fake engine keeps KV in name only: it needs no packages, memory or directories for it."""
    args(engine={"type": "fake"}, offload={"cpu_gib": 900}, shared_cache=lmcache(l1_gib=900, chunk_tokens=100))(base)
    assert check(base, tmp_path, installed=lambda module: False).ok


@pytest.mark.parametrize(
    ("missing", "change", "path", "words"),
    [
        ("nixl", args(), "transport.type", "the package nixl"),
        ("mooncake", args(transport={"type": "mooncake"}), "transport.type", "mooncake-transfer-engine-non-cuda"),
        ("lmcache", args(shared_cache=lmcache()), "shared_cache", "the package lmcache"),
        ("lmcache", args(shared_cache=external("tcp://h:1")), "shared_cache", "the package lmcache"),
        (
            "boto3",
            args(shared_cache=lmcache({"type": "s3", "endpoint": "s3://b.host", "region": "r"})),
            "shared_cache.server.l2[0].type",
            "needs boto3",
        ),
        (
            "lmcache.lmcache_mooncake",
            args(
                shared_cache=lmcache(
                    {"type": "mooncake_store", "master_server_address": "a:1", "metadata_server": "P2PHANDSHAKE"}
                )
            ),
            "shared_cache.server.l2[0].type",
            "build LMCache",
        ),
    ],
)
def test_missing_package(
    missing: str,
    change: Callable[[dict[str, Any]], None],
    path: str,
    words: str,
    base: dict[str, Any],
    tmp_path: Path,
) -> None:
    """A package that a transport or a tier needs is asked for before anything starts, without importing it."""
    change(base)
    report = check(base, tmp_path, installed=lambda module: module != missing)
    (problem,) = report.problems
    assert (problem.path, problem.severity) == (f"{A}.{path}", "error")
    assert words in problem.message
    assert problem.action


def test_a_layout_that_a_tier_cannot_keep_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    """Gemma 3 is refused with the shared tier on CPUs, and only with it; the named argument makes it possible."""
    keys = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**LLAMA, **keys}))
    assert check(base, tmp_path).problems == ()
    args(shared_cache=lmcache())(base)
    (problem,) = check(base, tmp_path).problems
    assert (problem.path, problem.severity) == (f"{A}.shared_cache", "error")
    assert "several groups" in problem.message
    assert problem.allowed and "full attention" in problem.allowed and "full + sliding" not in problem.allowed
    assert problem.action and "model.engine_kwargs.disable_hybrid_kv_cache_manager: true" in problem.action
    args(model__engine_kwargs__disable_hybrid_kv_cache_manager=True)(base)
    assert check(base, tmp_path).problems == ()


def test_ports_of_the_server(base: dict[str, Any], tmp_path: Path) -> None:
    """Ports that the config gives to an LMCache server have to be free on the machine it runs on."""
    busy = Machine(8, 32 * GIB, lambda host, port: "Address already in use" if port == 5555 else None)
    args(shared_cache=lmcache(port=5555, http_port=5556))(base)
    (problem,) = check(base, tmp_path, busy).problems
    assert (problem.path, problem.severity) == (f"{A}.shared_cache.server.port", "error")


def test_directory_without_permission(base: dict[str, Any], tmp_path: Path) -> None:
    """A directory that replicas may not write to is refused where they run, at its absolute path."""
    asked: list[str] = []

    def trouble(path: str) -> str:
        asked.append(path)
        return "no permission"

    args(shared_cache=lmcache({"type": "fs", "path": "kv"}))(base)
    machine = Machine(8, 32 * GIB, lambda host, port: None, directory_trouble=trouble)
    (problem,) = check(base, tmp_path, machine).problems
    assert (problem.path, problem.severity) == (f"{A}.shared_cache.server.l2[0].path", "error")
    assert asked == [str(tmp_path / "kv")]


def test_small_shared_memory(base: dict[str, Any], tmp_path: Path) -> None:
    """Engines want room in /dev/shm without any tier: a container's default of 64 MiB is too little."""
    (problem,) = check(base, tmp_path, Machine(8, 32 * GIB, lambda host, port: None, shm_bytes=64 * 2**20)).problems
    assert (problem.path, problem.severity) == (f"{A}.platform", "error")
    assert "--shm-size" in str(problem)


@pytest.mark.parametrize(
    ("num_gpus", "cpu_gib", "shm_gib", "field"),
    [
        (0, 1000, 1, None),  # a laptop that checks a config for others
        (8, 100, 500, None),
        (8, 100, 390, "offload.cpu_gib"),
        (4, 100, 390, None),  # two of the four engines run on another node
        (8, 140, 900, "shared_cache.server.l1_gib"),
        (8, 200, 900, "offload.cpu_gib"),
    ],
)
def test_tiers_on_a_gpu_node(
    num_gpus: int, cpu_gib: int, shm_gib: int, field: str | None, base: dict[str, Any], tmp_path: Path
) -> None:
    """A config for GPUs is compared with a machine only if it has some, for the engines that fit on it."""
    args(
        platform="cuda",
        offload={"cpu_gib": cpu_gib},
        shared_cache=lmcache(l1_gib=100),
        model__engine_kwargs={"tensor_parallel_size": 2, "max_model_len": 4096},
    )(base)
    pool(1, num_replicas=2)(base)
    pool(2, num_replicas=2)(base)
    machine = Machine(128, 600 * GIB, lambda host, port: None, shm_bytes=shm_gib * GIB, num_gpus=num_gpus)
    paths = [problem.path for problem in check(base, tmp_path, machine).problems]
    assert paths == ([f"{A}.{field}"] if field else [])


def test_all_problems_are_listed(base: dict[str, Any], tmp_path: Path) -> None:
    """One run shows the mistakes of all parts of the file."""
    for change in (top(typo=1), pool(0, name="gatewy"), args(platform="tpu"), args(cpu={"kv_cache_gib": 0})):
        change(base)
    paths = {problem.path for problem in check(base, tmp_path).problems}
    assert paths >= {"typo", f"{D}[0].name", f"{A}.platform", f"{A}.cpu.kv_cache_gib"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2", "line 2, column"),
        ("a: 1\na: 2", "written twice"),
        ("a:\n\t- b", "line 2, column 1"),
        ("", "expected a mapping"),
        ("- a", "expected a mapping"),
    ],
)
def test_not_a_config(text: str, words: str, tmp_path: Path) -> None:
    """Broken YAML is one problem with its place."""
    (problem,) = check(text, tmp_path).problems
    assert words in str(problem)


def test_missing_file(tmp_path: Path) -> None:
    """A file that cannot be read is a problem, not a traceback."""
    (problem,) = check_file(tmp_path / "nope.yaml", machine=MACHINE, ask=None).problems
    assert "No such file" in problem.message


def test_port_in_use(base: dict[str, Any], tmp_path: Path) -> None:
    """A port that is taken is reported before anything starts."""
    busy = Machine(8, 32 * GIB, lambda host, port: "Address already in use" if port == 8000 else None)
    (problem,) = check(base, tmp_path, busy).problems
    assert (problem.path, problem.severity) == ("http_options.port", "error")
    assert "127.0.0.1:8000: Address already in use" in problem.message


def test_haproxy_ports(base: dict[str, Any], tmp_path: Path) -> None:
    """Behind HAProxy its own two ports have to be free as well."""
    asked: list[int] = []
    env(RAY_SERVE_ENABLE_HA_PROXY="1", RAY_SERVE_HAPROXY_STATS_PORT="1234")(base)
    check(base, tmp_path, Machine(8, 32 * 1024**3, lambda host, port: asked.append(port)))
    assert asked == [8000, 1234, 9101]


def test_other_hosts_are_not_judged(base: dict[str, Any], tmp_path: Path) -> None:
    """On a cluster the memory and cores of this machine say nothing."""
    args(cpu={"kv_cache_gib": 200})(base)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(base))
    report = check_file(file, base_dir=tmp_path, machine=MACHINE, single_host=False, known_kwargs=KNOWN, ask=None)
    assert report.ok


def test_fake_engine_needs_no_model(base: dict[str, Any], tmp_path: Path) -> None:
    """A fake engine starts without model files."""
    args(engine={"type": "fake"}, model__source="./nope")(base)
    report = check(base, tmp_path)
    assert report.ok
    assert all(deployment.engine_args is None for deployment in report.deployments)


def test_validate_app_says_the_same(base: dict[str, Any], tmp_path: Path) -> None:
    """The application builder refuses with the words of the check, at paths in `args`."""
    args(decode__engine_kwargs={"tensor_parallel_size": 3})(base)
    config, invalid = parse_args(copy.deepcopy(base["applications"][0]["args"]))
    assert config is not None and not invalid
    problems = validate_app(resolve(config, tmp_path), known_kwargs=KNOWN)
    expected = [str(problem).replace("applications[0].", "") for problem in check(base, tmp_path).problems]
    assert [str(problem) for problem in problems] == expected


def test_resolve(tmp_path: Path) -> None:
    """Local paths become absolute; hub ids, inline templates and what is empty stay."""
    (tmp_path / "chat.jinja").write_text("x")
    config = AppConfig.model_validate(
        {
            "model": {
                "id": "m",
                "source": "./m",
                "engine_kwargs": {"chat_template": "chat.jinja", "dtype": "auto", "tool_parser_plugin": ""},
            },
            "gateway": {"admin": {"key_file": "key"}},
        }
    )
    resolved = resolve(config, tmp_path)
    assert resolved.model.source == str(tmp_path / "m")
    assert resolved.model.engine_kwargs == {
        "chat_template": str(tmp_path / "chat.jinja"),
        "dtype": "auto",
        "tool_parser_plugin": "",
    }
    assert resolved.gateway.admin.key_file == str(tmp_path / "key")
    hub = config.model_copy(update={"model": config.model.model_copy(update={"source": "Qwen/Qwen3-0.6B"})})
    assert resolve(hub, tmp_path).model.source == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_configs(file: Path, tmp_path: Path) -> None:
    """Every shipped config is sound on a machine with the cores it asks for, and says hardware and command first."""
    report = check_file(
        file,
        base_dir=tmp_path,
        machine=MACHINE,
        require_model=False,
        known_kwargs=[*KNOWN, "enforce_eager"],
        installed=lambda module: True,
        ask=None,
    )
    assert report.ok, report.render()
    assert report.deployments
    first = file.read_text().splitlines()[0]
    assert first.startswith("# Hardware: ") and "Command: disagg " in first
