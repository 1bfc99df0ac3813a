# SPDX-License-Identifier: Apache-2.0
"""What a model directory says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pools.plan.checkpoint import local_directory, read_checkpoint
from transport.errors import ConfigError

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "hidden_size": 256}


@pytest.mark.parametrize(
    ("source", "is_local"),
    [
        ("Qwen/Qwen3-0.6B", False),
        ("gpt2", False),
        (".cache/tiny", True),
        ("./tiny", True),
        ("../tiny", True),
        ("/models/tiny", True),
        ("~/tiny", True),
        ("models/llama/8b", True),
        ("here", True),
    ],
)
def test_local_directory(source: str, is_local: bool, tmp_path: Path) -> None:
    """What cannot be a hub id, or exists, is a directory."""
    (tmp_path / "here").mkdir()
    directory = local_directory(source, tmp_path)
    assert (directory is not None) == is_local
    assert directory is None or directory.is_absolute()


def test_shape(tmp_path: Path) -> None:
    """Heads, KV size and weights come from config.json and the files beside it."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "max_position_embeddings": 4096}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "tokenizer.json").write_text("{}")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.num_attention_heads == 4
    assert checkpoint.kv_elements_per_token == 2 * 4 * 2 * 64
    assert (checkpoint.weight_bytes, checkpoint.max_position_embeddings) == (1000, 4096)
    assert checkpoint.has_tokenizer


@pytest.mark.parametrize(
    "extra", [{"kv_lora_rank": 512}, {"layer_types": ["full_attention", "linear_attention"]}], ids=["latent", "hybrid"]
)
def test_kv_size_unknown(extra: dict[str, object], tmp_path: Path) -> None:
    """No KV size is claimed for attention that does not keep keys and values of every layer."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **extra}))
    assert read_checkpoint(tmp_path).kv_elements_per_token is None


@pytest.mark.parametrize(
    ("extra", "has_states"),
    [
        ({}, False),
        ({"layer_types": ["full_attention"] * 4}, False),
        ({"layer_types": ["sliding_attention", "full_attention"]}, False),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, True),
        ({"model_type": "qwen3_next", "full_attention_interval": 4}, True),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"], "mamba_d_state": 128}, True),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention"] * 4, "mamba_d_state": 128}, False),
        ({"model_type": "bamba", "attn_layer_indices": [1]}, True),
        ({"model_type": "jamba", "attn_layer_period": 8, "mamba_d_state": 16}, True),
        ({"model_type": "zamba2", "layers_block_type": ["mamba", "hybrid"]}, True),
        ({"model_type": "falcon_h1", "mamba_d_ssm": 4096}, True),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-"}, True),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, True),
        ({"model_type": "kimi_linear", "linear_attn_config": {"num_heads": 32}}, True),
        ({"model_type": "minimax_text_01", "attn_type_list": [0, 0, 1]}, True),
        ({"model_type": "minimax_m2", "attn_type_list": [1, 1, 1]}, False),
        ({"model_type": "mamba2", "state_size": 128}, True),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, False),
        ({"text_config": {**LLAMA, "layer_types": ["linear_attention"]}}, True),
    ],
)
def test_states(extra: dict[str, object], has_states: bool, tmp_path: Path) -> None:
    """A list of the layers says whether some keep a state; without one, the names that such models use."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **extra}))
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.kv_layout in ("mamba", "short_conv")) is has_states
    assert not has_states or checkpoint.kv_elements_per_token is None


WINDOW = {"sliding_window": 512}


@pytest.mark.parametrize(
    ("extra", "layout"),
    [
        ({}, "full_attention"),
        ({"layer_types": ["full_attention"] * 4, **WINDOW}, "full_attention"),
        ({"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8192}, "full_attention"),
        ({"layer_types": ["sliding_attention", "full_attention"], **WINDOW}, "full_and_sliding_window"),
        ({"layer_types": ["sliding_attention"] * 4, **WINDOW}, "sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": None}, "full_attention"),
        ({"model_type": "mistral", **WINDOW}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": None}, "full_attention"),
        ({"model_type": "gemma2", **WINDOW}, "full_and_sliding_window"),
        ({"text_config": {"model_type": "gemma3_text", **WINDOW}}, "full_and_sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": False, **WINDOW}, "full_attention"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 4, **WINDOW}, "full_attention"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2, **WINDOW},
            "full_and_sliding_window",
        ),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0, **WINDOW}, "sliding_window"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "mla_attention"),
        ({"model_type": "minicpm3", "kv_lora_rank": 256}, "full_attention"),
        ({"model_type": "kimi_linear", "kv_lora_rank": 512, "linear_attn_config": {"num_heads": 32}}, "mamba"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, "short_conv"),
        (
            {"architectures": ["BailingMoeV2_5ForCausalLM"], "layer_group_size": 5, "kv_lora_rank": 512},
            "short_conv",
        ),
        ({"model_type": "deepseek_v4", "compress_ratios": [4, 128], "sliding_window": 128}, "full_and_sliding_window"),
        ({"language_config": {"kv_lora_rank": 512}}, "mla_attention"),
        ({"llm_config": {"hybrid_override_pattern": "M-M*"}}, "mamba"),
        ({"is_encoder_decoder": True}, "cross_attention"),
    ],
)
def test_kv_layout(extra: dict[str, object], layout: str, tmp_path: Path) -> None:
    """Kinds of layers decide; where none are listed, what vLLM makes of the model's window."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **extra}))
    assert read_checkpoint(tmp_path).kv_layout == layout


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no config.json"), ("{", "not valid JSON"), ("[]", "JSON object")]
)
def test_unreadable(content: str | None, words: str, tmp_path: Path) -> None:
    """A directory that is no checkpoint is refused with the reason."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_checkpoint(tmp_path)


def test_mistrals_own_format(tmp_path: Path) -> None:
    """Its shape is not read, but it is a checkpoint, with weights and a tokenizer."""
    for name in ("params.json", "tekken.json", "consolidated.safetensors"):
        (tmp_path / name).write_text("{}")
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.num_attention_heads, checkpoint.weight_bytes, checkpoint.has_tokenizer) == (None, 2, True)


def test_lengths_beyond_the_positions(tmp_path: Path) -> None:
    """vLLM takes what `model_max_length` says where that is more."""
    (tmp_path / "config.json").write_text(
        json.dumps({**LLAMA, "max_position_embeddings": 4096, "model_max_length": 16384})
    )
    assert read_checkpoint(tmp_path).max_position_embeddings == 16384
