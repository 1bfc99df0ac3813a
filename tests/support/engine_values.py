# SPDX-License-Identifier: Apache-2.0
"""Values of vLLM's arguments that vLLM 0.32 refuses or is crippled by, and values that it takes, as a user writes them.

Each is judged by the vLLM that is installed. Where it is not plain why, a case says it in a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pools.config import SHARED_ENGINE_KWARGS

GPU_MODEL = "Qwen/Qwen3-0.6B"


@dataclass(frozen=True)
class Case:
    """One value of one argument."""

    argument: str
    value: Any
    at: str = ""
    """Where in the value the mistake is, as it follows the argument in the path."""
    why: str = ""
    beside: dict[str, Any] = field(default_factory=dict)
    """Other arguments that the value needs."""


WRONG: tuple[Case, ...] = (
    Case("dtype", "bf16"),
    Case("dtype", "fp16"),
    Case("dtype", 16),
    Case("kv_cache_dtype", "fp9"),
    Case("kv_cache_dtype", "int8", why="vLLM has int8_per_token_head"),
    Case("reasoning_parser", "qwen33"),
    Case("reasoning_parser", "none", why="to have none is to leave it out"),
    Case("tool_call_parser", "hermes3"),
    Case(
        "enable_auto_tool_choice",
        True,
        why="without a parser every request with tools fails",
        beside={"tool_call_parser": None, "tool_parser_plugin": ""},
    ),
    Case("enable_auto_tool_choice", "maybe"),
    Case("max_model_len", "4k", why="only vLLM's command line reads it"),
    Case("max_model_len", "auto", why="only vLLM's command line reads it, as -1"),
    Case("max_model_len", 0),
    Case("max_num_seqs", 0),
    Case("max_num_seqs", "many"),
    Case("max_num_batched_tokens", "8K"),
    Case("gpu_memory_utilization", 1.5),
    Case("gpu_memory_utilization", "90%"),
    Case("block_size", 0),
    Case("num_gpu_blocks_override", "all"),
    Case("seed", "abc"),
    Case("quantization", "gptq4"),
    Case("quantization", "int4"),
    Case("load_format", "safetensor"),
    Case("tokenizer_mode", "slow", why="removed from vLLM"),
    Case("config_format", "huggingface"),
    Case("attention_backend", "FLASHATTN"),
    Case("attention_backend", 2),
    Case("chat_template", "no/such/template.jinja"),
    Case("chat_template_content_format", "text"),
    Case("default_chat_template_kwargs", '{"enable_thinking": false}', why="JSON text is for the command line"),
    Case("scheduling_policy", "lifo"),
    Case("enforce_eager", "maybe"),
    Case("enable_prefix_caching", "sometimes"),
    Case("prefix_caching_hash_algo", "md5"),
    Case("max_logprobs", -5),
    Case("logprobs_mode", "raw"),
    Case("limit_mm_per_prompt", 3),
    Case("limit_mm_per_prompt", {"image": "many"}, at=".image"),
    Case("mm_processor_cache_gb", "lots"),
    Case("mm_processor_cache_type", "disk"),
    Case("mm_encoder_tp_mode", "rows"),
    Case("hf_overrides", "rope_theta=1"),
    Case("speculative_config", {"method": "ngramm", "num_speculative_tokens": 3}, at=".method"),
    Case("speculative_config", {"method": "ngram", "num_speculative_tokens": 0}, at=".num_speculative_tokens"),
    Case("speculative_config", {"method": "ngram", "tokens": 3}, at=".tokens"),
    Case("compilation_config", {"levle": 3}, at=".levle"),
    Case("compilation_config", 3, why="a mapping with mode: 3"),
    Case("compilation_config", {"cudagraph_mode": "SOME"}, at=".cudagraph_mode"),
    Case("cudagraph_capture_sizes", "1,2,4"),
    Case("max_cudagraph_capture_size", "big"),
    Case("async_scheduling", "perhaps"),
    Case("stream_interval", 0),
    Case("watermark", 1.0),
    Case("long_prefill_token_threshold", -1),
    Case("max_num_queued_reqs", -1),
    Case("max_num_queued_tokens", "10k"),
    Case("enable_chunked_prefill", "auto"),
    Case("logits_processors", ["json"], at="[0]"),
    Case("scheduler_cls", "vllm.v1.core.sched.scheduler.Schedular"),
    Case("tensor_parallel_size", 0),
    Case("expert_placement_strategy", "random"),
    Case("all2all_backend", "nccl"),
    Case("moe_backend", "fast", why="fails in a model with experts"),
    Case("linear_backend", "fast", why="fails in a quantised model"),
    Case("optimization_level", 9),
    Case("performance_mode", "fast"),
    Case("max_lora_rank", 20, beside={"enable_lora": True}),
    Case("lora_dtype", "float8", beside={"enable_lora": True}),
    Case("collect_detailed_traces", ["gpu"], at="[0]"),
    Case("collect_detailed_traces", ["all"], why="without otlp_traces_endpoint"),
    Case("kv_cache_metrics_sample", 0),
    Case("custom_histogram_buckets", {"latency": [1.0]}),
    Case("structured_outputs_config", {"backend": "regex"}, at=".backend"),
    Case("structured_outputs_config", {"reasoning_parser": "qwen33"}, at=".reasoning_parser"),
    Case("structured_outputs_config", {"disable_any_whitespace": True}, why="not with backend auto"),
    Case("override_generation_config", ["temperature"]),
    Case("runner", "pooling", why="no chat"),
    Case("convert", "embed", why="no chat"),
    Case("tool_parser_plugin", "no/such/plugin.py", beside={"tool_call_parser": None}),
    Case("tool_strict_level", "hard"),
    Case("log_level", "debug", why="vLLM has upper case"),
    Case("enable_log_outputs", True, why="without enable_log_requests"),
    Case("jit_monitor_mode", False, why="YAML reads off so"),
    Case("mamba_backend", "cuda"),
    Case("mamba_cache_dtype", "int8"),
    Case("safetensors_load_strategy", "mmap"),
    Case("cpu_offload_gb", -1),
    Case("offload_backend", "disk"),
    Case("attention_config", {"flash_attn_version": 5}, at=".flash_attn_version"),
    Case("attention_config", {"backend": "FLASH3"}, at=".backend"),
    Case("kernel_config", {"moe_backends": "triton"}, at=".moe_backends"),
    Case("fingerprint_mode", "short"),
    Case("max_log_len", "long"),
    Case("numa_bind_cpus", ["3-1"]),
    Case("shutdown_timeout", -1),
    Case("prefill_schedule_interval", 0),
    Case("profiler_config", {"profiler": "nsys"}, at=".profiler"),
    Case("eplb_config", {"window": 10}, at=".window"),
)

RIGHT: tuple[Case, ...] = (
    Case("dtype", "bfloat16"),
    Case("dtype", "half"),
    Case("dtype", "auto"),
    Case("kv_cache_dtype", "fp8"),
    Case("kv_cache_dtype", "auto"),
    Case("kv_cache_dtype", "fp8_e5m2"),
    Case("reasoning_parser", "qwen3"),
    Case("reasoning_parser", "deepseek_r1"),
    Case("reasoning_parser", ""),
    Case("tool_call_parser", "hermes"),
    Case("tool_call_parser", "qwen3_coder", why="without enable_auto_tool_choice vLLM leaves it aside"),
    Case("enable_auto_tool_choice", True, beside={"tool_call_parser": "llama3_json"}),
    Case("enable_auto_tool_choice", False),
    Case("max_model_len", 4096),
    Case("max_model_len", "8192", why="ModelConfig makes a number of it"),
    Case("max_model_len", -1, why="what fits into memory"),
    Case("max_num_seqs", 256),
    Case("max_num_batched_tokens", 8192),
    Case("gpu_memory_utilization", 0.9),
    Case("gpu_memory_utilization", 1),
    Case("block_size", 32),
    Case("num_gpu_blocks_override", None),
    Case("seed", 7),
    Case("quantization", "fp8"),
    Case("quantization", "FP8", why="vLLM takes any case"),
    Case("quantization", None),
    Case("load_format", "safetensors"),
    Case("load_format", "dummy"),
    Case("load_format", "runai_streamer"),
    Case("tokenizer_mode", "auto"),
    Case("tokenizer_mode", "mistral"),
    Case("config_format", "hf"),
    Case("attention_backend", "FLASHINFER"),
    Case("attention_backend", "flash_attn", why="vLLM takes any case"),
    Case("attention_backend", "auto"),
    Case("chat_template", "{{ messages }}"),
    Case("chat_template_content_format", "openai"),
    Case("default_chat_template_kwargs", {"enable_thinking": False}),
    Case("scheduling_policy", "priority"),
    Case("enforce_eager", True),
    Case("enforce_eager", "yes", why="a bool to pydantic"),
    Case("enable_prefix_caching", False),
    Case("prefix_caching_hash_algo", "sha256_cbor"),
    Case("max_logprobs", -1),
    Case("logprobs_mode", "processed_logprobs"),
    Case("limit_mm_per_prompt", {"image": 2}),
    Case("limit_mm_per_prompt", {"video": {"count": 1, "num_frames": 8}}),
    Case("mm_processor_cache_gb", 2),
    Case("mm_processor_cache_type", "shm"),
    Case("mm_encoder_tp_mode", "data"),
    Case("hf_overrides", {"rope_theta": 1000000}),
    Case("speculative_config", {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}),
    Case("speculative_config", {"method": "ngram", "num-speculative-tokens": 2, "prompt_lookup_max": 4}),
    Case("compilation_config", {"mode": 3, "cudagraph_capture_sizes": [1, 2]}),
    Case("compilation_config", {"cudagraph_mode": "PIECEWISE"}),
    Case("cudagraph_capture_sizes", [1, 2, 4]),
    Case("max_cudagraph_capture_size", 256),
    Case("async_scheduling", True),
    Case("stream_interval", 4),
    Case("watermark", 0.01),
    Case("long_prefill_token_threshold", 0),
    Case("max_num_queued_reqs", 100),
    Case("enable_chunked_prefill", True),
    Case("logits_processors", ["vllm.v1.sample.logits_processor:MinPLogitsProcessor"]),
    Case("scheduler_cls", "vllm.v1.core.sched.scheduler.Scheduler"),
    Case("expert_placement_strategy", "round_robin"),
    Case("all2all_backend", "deepep_low_latency"),
    Case("moe_backend", "triton"),
    Case("linear_backend", "auto"),
    Case("optimization_level", 1),
    Case("performance_mode", "throughput"),
    Case("max_lora_rank", 32),
    Case("lora_dtype", "bfloat16"),
    Case("kv_cache_metrics_sample", 0.5),
    Case("custom_histogram_buckets", {"request_latency": [0.1, 1, 10]}),
    Case("structured_outputs_config", {"backend": "xgrammar", "disable_any_whitespace": True}),
    Case("structured_outputs_config", {"backend": "guidance"}),
    Case("override_generation_config", {"temperature": 0.5}),
    Case("runner", "generate"),
    Case("tool_strict_level", "parameter"),
    Case("log_level", "WARNING"),
    Case("enable_log_outputs", True, beside={"enable_log_requests": True}),
    Case("jit_monitor_mode", "error"),
    Case("mamba_backend", "flashinfer"),
    Case("mamba_cache_dtype", "float32"),
    Case("safetensors_load_strategy", "prefetch"),
    Case("cpu_offload_gb", 4),
    Case("offload_backend", "uva"),
    Case("attention_config", {"flash_attn_version": 3}),
    Case("kernel_config", {"moe_backend": "flashinfer-cutlass"}, why="KernelConfig takes dashes"),
    Case("fingerprint_mode", "none"),
    Case("max_log_len", 100),
    Case("shutdown_timeout", 5),
    Case("profiler_config", {"profiler": "torch", "torch_profiler_dir": "/tmp/profile"}),
    Case("gdn_prefill_backend", "triton"),
    Case("trust_remote_code", True),
    Case("revision", "main"),
    Case("enable_sleep_mode", True, why="only on GPUs"),
    Case("disable_custom_all_reduce", True),
    Case("enable_expert_parallel", True),
    Case("enable_lora", True),
    Case("generation_config", "vllm"),
    Case("allowed_media_domains", ["example.com"]),
)
"""What an engine on GPUs takes. The check has to know it on a machine without one."""

RIGHT_ON_CPU: tuple[Case, ...] = (
    Case("dtype", "float32"),
    Case("max_model_len", "2048"),
    Case("max_num_seqs", 16),
    Case("max_num_batched_tokens", 512),
    Case("block_size", 64),
    Case("enforce_eager", True),
    Case("enable_prefix_caching", True),
    Case("seed", 1),
    Case("structured_outputs_config", {"backend": "xgrammar"}),
    Case("scheduling_policy", "priority"),
    Case("generation_config", "vllm"),
    Case("max_logprobs", 5),
)
"""What the tiny model's engine on CPUs takes, all of it together."""

WRONG_TOGETHER: tuple[Case, ...] = (
    Case("long_prefill_token_threshold", 100_000, why="more than the model's length"),
    Case("max_num_active_seqs", 64, why="more than max_num_seqs", beside={"max_num_seqs": 16}),
    Case("quantization", "awq", why="the model is not quantised so"),
    Case("enable_sleep_mode", True, why="only on GPUs"),
    Case("kda_prefill_backend", "flashkda", why="only on GPUs"),
)
"""What only all arguments together with the model and the device show. On CPUs, with the tiny model."""


@dataclass(frozen=True)
class File:
    """Cases that stand in one config file, each argument once."""

    cases: tuple[Case, ...]
    data: dict[str, Any]
    """The file's content."""
    paths: tuple[str, ...]
    """Where each case is at fault, or would be."""

    def written(self, path: Path) -> Path:
        path.write_text(yaml.safe_dump(self.data, sort_keys=False), encoding="utf-8")
        return path


def files(cases: Sequence[Case], *, platform: Literal["cpu", "cuda"], source: str) -> Iterator[File]:
    """As few files as hold all cases. Arguments that a pool may have of its own stand below decode."""
    left = list(cases)
    while left:
        taken: dict[str, Case] = {}
        rest: list[Case] = []
        used: set[str] = set()
        for case in left:
            names = {case.argument, *case.beside}
            if names & used:
                rest.append(case)
            else:
                taken[case.argument] = case
                used |= names
        yield _file(tuple(taken.values()), platform, source)
        left = rest


def _file(cases: tuple[Case, ...], platform: str, source: str) -> File:
    model: dict[str, Any] = {}
    decode: dict[str, Any] = {}
    paths = []
    for case in cases:
        for name, value in {case.argument: case.value, **case.beside}.items():
            (model if name in SHARED_ENGINE_KWARGS else decode)[name] = value
        place = "model" if case.argument in SHARED_ENGINE_KWARGS else "decode"
        paths.append(f"applications[0].args.{place}.engine_kwargs.{case.argument}{case.at}")
    data = {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": "disagg",
                "route_prefix": "/",
                "import_path": "disagg.app:build",
                "external_scaler_enabled": True,
                "args": {
                    "model": {"id": "m", "source": source, "engine_kwargs": model},
                    "platform": platform,
                    "decode": {"engine_kwargs": decode},
                },
            }
        ],
    }
    return File(cases, data, tuple(paths))
