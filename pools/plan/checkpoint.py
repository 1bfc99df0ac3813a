# SPDX-License-Identifier: Apache-2.0
"""What a model's own files say: whether the source is a directory, and the shape that sizes and splits depend on.

Reads `config.json` and file sizes; loads no weights and asks no hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transport.errors import ConfigError
from transport.kv_layouts import KvLayout

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
_TEXT_PARTS = ("text_config", "language_config", "llm_config")
"""Where models with other media keep what their language model is: most of them, DeepSeek-VL2, Nemotron Nano VL."""
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_RECURRENT_LAYER = re.compile(r"mamba|linear|conv|recurrent|ssm|delta|rwkv|hybrid", re.IGNORECASE)
_RECURRENT_KEYS = (
    "mamba_d_state",
    "mamba_d_ssm",
    "mamba_n_heads",
    "mamba_num_heads",
    "ssm_state_size",
    "ssm_cfg",
    "state_size",
    "attn_layer_period",
    "full_attention_interval",
    "linear_attn_config",
    "linear_num_key_heads",
    "conv_L_cache",
)
_RECURRENT_MODELS = re.compile(r"mamba|jamba|bamba|rwkv|nemotron_h|falcon_h1|plamo2|minimax_text_01|minimax_m1|lfm2")
_ALTERNATING_MODELS = re.compile(
    r"afmoe|cohere2|cwm|dots1|exaone4|exaone_moe|gemma2|gemma3|gemma4|gpt_oss|granite_swa|granitemoe_swa|laguna|mellum"
    r"|mimo_v2|muse_glimmer|olmo3|vaultgemma"
)
"""Models that have full attention in some layers, without saying in which. An older `config.json` lists no layers."""


@dataclass(frozen=True)
class Checkpoint:
    """A local model directory. A number is None where the files do not say it or it does not apply."""

    num_attention_heads: int | None
    num_key_value_heads: int | None
    max_position_embeddings: int | None
    kv_elements_per_token: int | None
    """Numbers that one token adds to the KV cache over all layers and ranks; None for latent or hybrid attention."""
    weight_bytes: int
    """Size of the weight files."""
    has_tokenizer: bool
    kv_layout: KvLayout = "full_attention"
    """How vLLM groups the KV with its hybrid KV cache manager on, as far as `config.json` tells."""


def local_directory(source: str, base_dir: Path) -> Path | None:
    """The absolute directory that `source` names, or None when it is a Hugging Face id.

    A source that cannot be an id (it starts with `.`, `/` or `~`, or has more than one slash) names a directory
    whether or not it exists; one that could be an id names a directory only if that exists.
    """
    path = (base_dir / Path(source).expanduser()).absolute()
    if _HUB_ID.fullmatch(source) and not path.is_dir():
        return None
    return path


def read_checkpoint(directory: Path) -> Checkpoint:
    """The shape of the model in `directory`.

    Raises:
        ConfigError: the directory, or a readable `config.json` in it, does not exist.
    """
    if not directory.is_dir():
        raise ConfigError(f"{str(directory)!r} is not a directory")
    path = directory / "config.json"
    if not path.is_file():
        if (directory / "params.json").is_file():  # in Mistral's own format, of which vLLM makes the other one
            return Checkpoint(None, None, None, None, *_files(directory))
        raise ConfigError(f"{str(directory)!r} has no config.json, so it is no model checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ConfigError(f"{str(path)!r} is not valid JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise ConfigError(f"{str(path)!r} does not hold a JSON object")
    text = next((config[key] for key in _TEXT_PARTS if isinstance(config.get(key), dict)), config)
    heads = _number(text, "num_attention_heads")
    weight_bytes, has_tokenizer = _files(directory)
    scaled = any(
        isinstance(text.get(key), dict) and "factor" in text[key] for key in ("rope_scaling", "rope_parameters")
    )
    return Checkpoint(
        num_attention_heads=heads,
        num_key_value_heads=_number(text, "num_key_value_heads") or heads,
        max_position_embeddings=None if scaled else _longest(text),
        kv_elements_per_token=_kv_elements(text),
        weight_bytes=weight_bytes,
        has_tokenizer=has_tokenizer,
        kv_layout=_kv_layout(config, text),
    )


def _files(directory: Path) -> tuple[int, bool]:
    """Bytes of weights, and whether there is a tokenizer."""
    weight_bytes = sum(file.stat().st_size for file in directory.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    return weight_bytes, any((directory / name).is_file() for name in _TOKENIZER_FILES)


def _longest(text: Mapping[str, Any]) -> int | None:
    """Tokens that the model was made for. Source: vLLM 0.32 `_get_and_verify_max_len`."""
    positions = _number(text, "max_position_embeddings")
    return None if positions is None else max(positions, _number(text, "model_max_length") or 0)


def _kv_layout(config: Mapping[str, Any], text: Mapping[str, Any]) -> KvLayout:
    """How vLLM groups the KV. Chunked attention (Llama 4) counts as full: vLLM turns its hybrid manager off for it.

    Source:
        vLLM 0.32 `VllmConfig.__post_init__` (`attention_chunk_size`), `EngineArgs.create_engine_config`
        (`sliding_window`: that of all layers only where no list of layers names others), `ModelConfig.use_mla`.
    """
    if config.get("is_encoder_decoder"):
        return "cross_attention"
    if any("BailingMoeV2_5" in str(name) for name in config.get("architectures") or ()):
        return "short_conv"  # lightning attention in most layers, which only the group size tells
    if _is_recurrent(text):
        return "short_conv" if _number(text, "conv_L_cache") or "conv" in _layer_types(text) else "mamba"
    if text.get("compress_ratios") and _number(text, "sliding_window"):
        return "full_and_sliding_window"  # DeepSeek V4: latents in one group, windows in others
    # MiniCPM3 keeps keys and values; only its weights are latent.
    if _number(text, "kv_lora_rank") and text.get("model_type") != "minicpm3":
        return "mla_attention"
    if text.get("use_sliding_window") is False or not text.get("sliding_window", True):
        return "full_attention"
    kinds = {"sliding" if "sliding" in kind else "full" for kind in _layer_types(text)}
    if not kinds and "sliding_window" in text:
        kinds = _kinds_of_windowed(text)
    if kinds == {"sliding", "full"}:
        return "full_and_sliding_window"
    return "sliding_window" if kinds == {"sliding"} else "full_attention"


def _kinds_of_windowed(text: Mapping[str, Any]) -> set[str]:
    """Kinds of layers in a model with a window whose `config.json` lists no layers."""
    if _ALTERNATING_MODELS.search(str(text.get("model_type", ""))):
        return {"sliding", "full"}
    first, layers = _number(text, "max_window_layers"), _number(text, "num_hidden_layers")
    if first is None or layers is None:
        return {"sliding"}
    # Qwen2: the first `max_window_layers` layers have no window.
    return {"full"} if first >= layers else {"sliding", "full"}


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    types = config.get("layer_types") or config.get("layers_block_type") or []
    return [str(kind) for kind in types] if isinstance(types, list) else []


def _is_recurrent(config: Mapping[str, Any]) -> bool:
    """Whether any layer keeps a state. A list of the layers decides; without one, the names that such models use.

    Source:
        config.json of Jamba, Bamba, Zamba2, Falcon-H1, Nemotron-H, Granite 4, LFM2, Qwen3-Next, Kimi-Linear and
        MiniMax-01.
    """
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return "M" in pattern
    types = _layer_types(config)
    if types:
        return any(_RECURRENT_LAYER.search(kind) for kind in types)
    attention_types = config.get("attn_type_list")
    if isinstance(attention_types, list):  # MiniMax-01: 0 is linear attention
        return 0 in attention_types
    model_type = str(config.get("model_type", ""))
    return bool(_RECURRENT_MODELS.search(model_type)) or any(config.get(key) for key in _RECURRENT_KEYS)


def _kv_elements(config: Mapping[str, Any]) -> int | None:
    layers, heads = _number(config, "num_hidden_layers"), _number(config, "num_attention_heads")
    hidden = _number(config, "hidden_size")
    kv_heads = _number(config, "num_key_value_heads") or heads
    head_dim = _number(config, "head_dim") or (hidden // heads if hidden and heads else None)
    uniform = {"full_attention"}.issuperset(config.get("layer_types") or ["full_attention"])
    if not (layers and kv_heads and head_dim and uniform) or _number(config, "kv_lora_rank") or _is_recurrent(config):
        return None
    return 2 * layers * kv_heads * head_dim


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
