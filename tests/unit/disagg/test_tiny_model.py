# SPDX-License-Identifier: Apache-2.0
"""The tiny model's files: the same for the same seed, and consistent with one another. No weights are loaded."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import jinja2
import pytest

from disagg.tiny_model import BOS, CHAT_TEMPLATE, EOS, VOCAB_SIZE, TinyLlama, tensor_shapes, write_tiny_model


def _render(**values: object) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(CHAT_TEMPLATE).render(bos_token=BOS, eos_token=EOS, **values)


def _header(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint written once for the module."""
    directory = tmp_path_factory.mktemp("model")
    write_tiny_model(directory)
    return directory


def test_same_seed_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    """Writing again produces byte-identical files."""
    write_tiny_model(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }


def test_safetensors_header_describes_every_tensor(model: Path) -> None:
    """The header lists each tensor with its shape, and the offsets cover the rest of the file without a gap."""
    header = _header(model / "model.safetensors")
    header.pop("__metadata__")
    assert {name: tuple(entry["shape"]) for name, entry in header.items()} == tensor_shapes(TinyLlama())
    end = 0
    for entry in header.values():
        assert entry["data_offsets"] == [end, end + 2 * prod(entry["shape"])]
        end = entry["data_offsets"][1]
    content = (model / "model.safetensors").read_bytes()
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + end


def test_tokenizer_matches_the_config(model: Path) -> None:
    """The tokenizer has as many tokens as the embedding, and the special ids of the config."""
    config = json.loads((model / "config.json").read_text())
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == config["vocab_size"] == VOCAB_SIZE
    assert (vocabulary[BOS], vocabulary[EOS]) == (config["bos_token_id"], config["eos_token_id"])


def test_tokenizer_round_trips_any_text(model: Path) -> None:
    """Byte-level tokens give back text that the tokenizer was not trained on."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = 'Héllo wörld! 漢字 \U0001f600 {"a": [1, 2]}\n\tdone '
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert tokenizer.encode(text).tokens[0] == BOS


def test_chat_template_renders_every_role() -> None:
    """Each role has its marker, `developer` is `system`, and the prompt ends where the assistant begins."""
    messages = [{"role": role, "content": role} for role in ("developer", "user", "assistant", "tool")]
    assert _render(messages=messages, add_generation_prompt=True) == (
        "<|bos|><|system|>developer<|eos|><|user|>user<|eos|><|assistant|>assistant<|eos|><|tool|>tool<|eos|>"
        "<|assistant|>"
    )


def test_chat_template_renders_tools_and_calls() -> None:
    """Tools come first, as JSON, and a call of the assistant is part of its turn."""
    tool = {"type": "function", "function": {"name": "f"}}
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    text = _render(tools=[tool], messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert text.startswith('<|bos|><|system|>You may call these functions:\n{"function": {"name": "f"}')
    assert '<|assistant|><tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><|eos|>' in text


def test_chat_template_joins_text_parts() -> None:
    """Content given as a list of parts reads like one string."""
    content = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert "<|user|>one two<|eos|>" in _render(messages=[{"role": "user", "content": content}])
