# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with random weights, one for each KV layout, that vLLM's CPU build runs or refuses as it would a
real model of that kind. The sizes are the smallest that vLLM's CPU kernels take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disagg.tiny_model import MAX_POSITIONS, VOCAB_SIZE, TinyLlama, tensor_shapes, token_ids, write_checkpoint

WINDOW = 96
"""Tokens that a sliding-window layer sees; three KV blocks."""
BLOCK = {"block_size": 32}
HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 256, 512, 4, 2, 64


@dataclass(frozen=True)
class LayoutModel:
    """What `write` needs, and what an engine of the model needs."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    initializer_range: float = 0.2
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further JSON files by name."""


def _config(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        **token_ids(),
        **more,
    }


def _around(layers: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN),
        **layers,
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB_SIZE, HIDDEN),
    }


def _mlp(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": (INNER, HIDDEN),
        f"{prefix}.mlp.down_proj.weight": (HIDDEN, INNER),
    }


def _norms(prefix: str, *names: str) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}.weight": (HIDDEN,) for name in names}


def _attention(prefix: str, *, gates: int = 1) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.self_attn.q_proj.weight": (gates * HEADS * HEAD, HIDDEN),
        f"{prefix}.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        f"{prefix}.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        f"{prefix}.self_attn.q_norm.weight": (HEAD,),
        f"{prefix}.self_attn.k_norm.weight": (HEAD,),
    }


def llama() -> LayoutModel:
    """Every layer keeps every token."""
    sizes = TinyLlama(num_layers=2, intermediate_size=INNER)
    config = _config("LlamaForCausalLM", "llama", num_hidden_layers=sizes.num_layers, head_dim=HEAD)
    return LayoutModel(config, tensor_shapes(sizes), BLOCK)


def gemma3() -> LayoutModel:
    """Gemma 3: two layers with a sliding window, one without."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(len(kinds)):
        prefix = f"model.layers.{number}"
        shapes |= _norms(
            prefix,
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
        shapes |= _attention(prefix) | _mlp(prefix)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = _config(
        "Gemma3ForCausalLM",
        "gemma3_text",
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        sliding_window=WINDOW,
        head_dim=HEAD,
        query_pre_attn_scalar=HEAD,
        hidden_activation="gelu_pytorch_tanh",
        rope_parameters={"sliding_attention": rope, "full_attention": rope},
    )
    return LayoutModel(config, _around(shapes), BLOCK)


def mistral() -> LayoutModel:
    """Mistral 7B v0.1: every layer has the same sliding window."""
    sizes = TinyLlama(num_layers=2, intermediate_size=INNER)
    config = _config(
        "MistralForCausalLM", "mistral", num_hidden_layers=sizes.num_layers, sliding_window=WINDOW, head_dim=HEAD
    )
    return LayoutModel(config, tensor_shapes(sizes), BLOCK)


def deepseek() -> LayoutModel:
    """DeepSeek V2 with dense layers. vLLM's CPU kernel takes one size of latent (512 + 64) and one of blocks (16)."""
    latent, rope, nope, value, layers = 512, 64, 64, 64, 2
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(layers):
        prefix = f"model.layers.{number}"
        shapes |= _norms(prefix, "input_layernorm", "post_attention_layernorm") | _mlp(prefix)
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (HEADS * (nope + rope), HIDDEN),
            f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": (latent + rope, HIDDEN),
            f"{prefix}.self_attn.kv_a_layernorm.weight": (latent,),
            f"{prefix}.self_attn.kv_b_proj.weight": (HEADS * (nope + value), latent),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * value),
        }
    config = _config(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        num_hidden_layers=layers,
        num_key_value_heads=HEADS,
        first_k_dense_replace=layers,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=INNER,
        q_lora_rank=None,
        kv_lora_rank=latent,
        qk_rope_head_dim=rope,
        qk_nope_head_dim=nope,
        v_head_dim=value,
    )
    return LayoutModel(config, _around(shapes), initializer_range=0.05)


def qwen3_next() -> LayoutModel:
    """Qwen3-Next: a layer of linear attention (Gated DeltaNet), one of full attention with two experts.

    vLLM's kernel for the former takes bfloat16 alone, and its code wants a layer with experts."""
    kinds = ["linear_attention", "full_attention"]
    state_heads, state_head, kernel, experts = 2, 64, 4, 2
    inner = state_heads * state_head
    linear, full = (f"model.layers.{number}" for number in range(len(kinds)))
    shapes = {
        **_norms(linear, "input_layernorm", "post_attention_layernorm"),
        **_mlp(linear),
        f"{linear}.linear_attn.in_proj_qkvz.weight": (4 * inner, HIDDEN),
        f"{linear}.linear_attn.in_proj_ba.weight": (2 * state_heads, HIDDEN),
        f"{linear}.linear_attn.conv1d.weight": (3 * inner, 1, kernel),
        f"{linear}.linear_attn.A_log": (state_heads,),
        f"{linear}.linear_attn.dt_bias": (state_heads,),
        f"{linear}.linear_attn.norm.weight": (state_head,),
        f"{linear}.linear_attn.out_proj.weight": (HIDDEN, inner),
        **_norms(full, "input_layernorm", "post_attention_layernorm"),
        **_attention(full, gates=2),
        f"{full}.mlp.gate.weight": (experts, HIDDEN),
        f"{full}.mlp.shared_expert_gate.weight": (1, HIDDEN),
    }
    for block in ("shared_expert", *(f"experts.{number}" for number in range(experts))):
        shapes |= {name.replace(".mlp.", f".mlp.{block}."): shape for name, shape in _mlp(full).items()}
    config = _config(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        head_dim=HEAD,
        num_experts=experts,
        num_experts_per_tok=1,
        mlp_only_layers=[0],
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=INNER,
        linear_conv_kernel_dim=kernel,
        linear_key_head_dim=state_head,
        linear_value_head_dim=state_head,
        linear_num_key_heads=state_heads,
        linear_num_value_heads=state_heads,
    )
    return LayoutModel(config, _around(shapes), {"dtype": "bfloat16"})


def lfm2() -> LayoutModel:
    """LFM2: a layer of short convolution, one of full attention."""
    kinds = ["conv", "full_attention"]
    shapes: dict[str, tuple[int, ...]] = {}
    for number, kind in enumerate(kinds):
        prefix = f"model.layers.{number}"
        shapes |= _norms(prefix, "operator_norm", "ffn_norm")
        shapes |= {
            f"{prefix}.feed_forward.w1.weight": (INNER, HIDDEN),
            f"{prefix}.feed_forward.w2.weight": (HIDDEN, INNER),
            f"{prefix}.feed_forward.w3.weight": (INNER, HIDDEN),
        }
        if kind == "conv":
            shapes |= {
                f"{prefix}.conv.conv.weight": (HIDDEN, 1, 3),
                f"{prefix}.conv.in_proj.weight": (3 * HIDDEN, HIDDEN),
                f"{prefix}.conv.out_proj.weight": (HIDDEN, HIDDEN),
            }
        else:
            shapes |= {
                f"{prefix}.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
                f"{prefix}.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
                f"{prefix}.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
                f"{prefix}.self_attn.out_proj.weight": (HIDDEN, HEADS * HEAD),
                f"{prefix}.self_attn.q_layernorm.weight": (HEAD,),
                f"{prefix}.self_attn.k_layernorm.weight": (HEAD,),
            }
    config = _config(
        "Lfm2ForCausalLM",
        "lfm2",
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        conv_L_cache=3,
        conv_dim=HIDDEN,
        block_dim=HIDDEN,
        conv_bias=False,
        norm_eps=1e-5,
        block_auto_adjust_ff_dim=False,
        tie_word_embeddings=True,
    )
    outside = {
        "model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN),
        **shapes,
        "model.embedding_norm.weight": (HIDDEN,),
    }
    return LayoutModel(config, outside)


def whisper() -> LayoutModel:
    """Whisper, an encoder-decoder. It has no weights, because vLLM refuses it before they matter."""
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "d_model": HIDDEN,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": INNER,
        "decoder_ffn_dim": INNER,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        "decoder_start_token_id": 0,
        **token_ids(),
    }
    extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "WhisperProcessor"}
    kwargs = {"load_format": "dummy", "max_model_len": 256}
    return LayoutModel(config, {}, kwargs, files={"preprocessor_config.json": extractor})


MODELS = {one.__name__: one for one in (llama, gemma3, mistral, deepseek, qwen3_next, lfm2, whisper)}


def write(name: str, directory: Path) -> Path:
    """The checkpoint `name` of `MODELS` in a directory below `directory`."""
    model, path = MODELS[name](), directory / name
    path.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, model.config, model.shapes, model.initializer_range)
    for file, content in model.files.items():
        (path / file).write_text(json.dumps(content) + "\n")
    return path
