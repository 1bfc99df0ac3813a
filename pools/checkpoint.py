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

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


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
        raise ConfigError(f"{str(directory)!r} has no config.json, so it is no model checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ConfigError(f"{str(path)!r} is not valid JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise ConfigError(f"{str(path)!r} does not hold a JSON object")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    heads = _number(text, "num_attention_heads")
    scaled = any(
        isinstance(text.get(key), dict) and "factor" in text[key] for key in ("rope_scaling", "rope_parameters")
    )
    return Checkpoint(
        num_attention_heads=heads,
        num_key_value_heads=_number(text, "num_key_value_heads") or heads,
        max_position_embeddings=None if scaled else _number(text, "max_position_embeddings"),
        kv_elements_per_token=_kv_elements(text),
        weight_bytes=sum(file.stat().st_size for file in directory.iterdir() if file.suffix in _WEIGHT_SUFFIXES),
        has_tokenizer=any((directory / name).is_file() for name in _TOKENIZER_FILES),
    )


def _kv_elements(config: Mapping[str, Any]) -> int | None:
    layers, heads = _number(config, "num_hidden_layers"), _number(config, "num_attention_heads")
    hidden = _number(config, "hidden_size")
    kv_heads = _number(config, "num_key_value_heads") or heads
    head_dim = _number(config, "head_dim") or (hidden // heads if hidden and heads else None)
    uniform = {"full_attention"}.issuperset(config.get("layer_types") or ["full_attention"])
    if not (layers and kv_heads and head_dim and uniform) or _number(config, "kv_lora_rank"):
        return None
    return 2 * layers * kv_heads * head_dim


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
