# SPDX-License-Identifier: Apache-2.0
"""Writes a tiny Llama checkpoint with random weights, so that the whole stack runs without a model hub or a GPU.

Its answers mean nothing, but greedy ones are the same every time and vary from token to token. Weights are drawn with
NumPy and the tokenizer is trained on the words below, so a seed always gives the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB_SIZE = 2048
MAX_POSITIONS = 8192
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
SPECIAL_TOKENS = (BOS, EOS, PAD, *ROLES)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
{{- '<|system|>You may call these functions:\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
{{- 'To call one, answer <tool_call>{"name": ..., "arguments": ...}</tool_call>.' + eos_token }}
{%- endif %}
{%- for message in messages %}
{%- if message.role not in ['system', 'developer', 'user', 'assistant', 'tool'] %}
{{- raise_exception('unknown role: ' + message.role) }}
{%- endif %}
{{- '<|' + ('system' if message.role == 'developer' else message.role) + '|>' }}
{%- if message.content is string %}{{- message.content }}
{%- elif message.content %}{%- for part in message.content %}{{- part.text }}{%- endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}{%- endif %}
{{- '}</tool_call>' }}
{%- endfor %}
{{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""

_STEMS = """
account answer arrive balance basket begin bridge bright broad butter camera candle carry castle center change circle
clear climb cloud coast collect color common cover create cross danger decide deliver desert design detail doubt dream
drive early earth empty engine enter evening example explain family farm father field figure finger finish flower
follow forest forget friend garden gather gentle glass grand green ground guard handle happen harbor harvest history
holiday honest hundred import indicate island journey kitchen ladder language laugh lemon letter level library listen
little lunch machine manage market matter measure memory message metal middle minute mirror moment morning mother
mountain music narrow nature neighbor north notice number object ocean offer office open orange order other paper
parent people perfect period picture planet plenty pocket point popular power prefer present prevent problem produce
promise protect provide public purple question quick quiet reach reason receive record remember repeat report request
result return river season second sense serious shadow silver simple single sister smooth soldier south speak spring
square station steady stone story stream street strong student summer sunlight supply surface table teacher thousand
ticket together tomorrow travel trouble understand valley village visit water weather weight window winter wonder yellow
""".split()
_ENDINGS = ("", "s", "ed", "ing", "er", "ly", "ness", "able", "ment", "ful")
_SENTENCES = """
The quick brown fox jumps over the lazy dog, and then it sleeps under the old tree.
What is the capital of France? Write a short story about a ship that was lost at sea.
Once upon a time there were three brothers who lived in a house by the river with their mother.
I think that we should have been there before it was too late, but nobody could have known about it.
def prefill(request): return [token for token in request.prompt_token_ids if token is not None]
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius", "days": 3}}
<tool_call>{"name": "search", "arguments": {"query": "", "limit": 10}}</tool_call> true false null
You are a helpful assistant. Please answer in one or two sentences, and say so when you do not know.
0 1 2 3 4 5 6 7 8 9 10 11 12 16 20 24 32 48 64 100 128 256 512 1000 1024 2026 http://127.0.0.1:8000/v1
""".strip().splitlines()


@dataclass(frozen=True)
class TinyLlama:
    """Sizes of the checkpoint: 4 million parameters, 8 MB in bfloat16, 2 KiB of KV a token."""

    num_layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 688
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    initializer_range: float = 0.2
    """Large enough that greedy answers do not repeat one token."""


def write_tiny_model(directory: Path, seed: int = 0) -> None:
    """Writes the checkpoint, tokenizer and chat template into `directory`, replacing files of the same name.

    Blocks for about a second. Needs `numpy` and `tokenizers`; loads neither torch nor transformers.

    Args:
        seed: of the weights; the tokenizer is the same for every seed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes = TinyLlama()
    write_checkpoint(directory, model_config(sizes), tensor_shapes(sizes), sizes.initializer_range, seed)


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    initializer_range: float,
    seed: int = 0,
) -> None:
    """Writes a checkpoint of any architecture with random weights and this tokenizer into an existing `directory`.

    Args:
        config: content of `config.json`, with `VOCAB_SIZE` tokens.
        shapes: of every tensor, in the order in which they are drawn. Those of one dimension are filled with ones.
        initializer_range: standard deviation of the others.
    """
    _write_weights(directory / "model.safetensors", shapes, initializer_range, seed)
    _write_tokenizer(directory / "tokenizer.json")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, content in (
        ("config.json", config),
        ("generation_config.json", token_ids()),
        ("tokenizer_config.json", _tokenizer_config()),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def model_config(sizes: TinyLlama) -> dict[str, Any]:
    """Content of `config.json`, in the names of transformers 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "initializer_range": sizes.initializer_range,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **token_ids(),
    }


def tensor_shapes(sizes: TinyLlama) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, by its name in a Llama checkpoint and in the order in which they are drawn."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden)}
    for layer in range(sizes.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCAB_SIZE, hidden)}


def training_text() -> Iterator[str]:
    """Text the tokenizer is trained on: every stem with every ending, and sentences, code and JSON."""
    for sentence in _SENTENCES:
        yield from [sentence] * 20
    for ending in _ENDINGS:
        yield " " + " ".join(stem + ending for stem in _STEMS)
        yield " ".join((stem + ending).capitalize() for stem in _STEMS)


def token_ids() -> dict[str, int]:
    """The special tokens, in the names of `config.json`."""
    return {
        f"{name}_token_id": SPECIAL_TOKENS.index(token) for name, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))
    }


def _tokenizer_config() -> Mapping[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
            ),
        ]
    )
    tokenizer.save(str(path))


def _write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], initializer_range: float, seed: int) -> None:
    """Writes the safetensors format: header length (8 bytes), JSON header padded to 8 bytes, tensors end to end."""
    import numpy

    random = numpy.random.Generator(numpy.random.PCG64(seed))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    tensors: list[bytes] = []
    offset = 0
    for name, shape in shapes.items():
        values: Any = numpy.ones(shape, dtype=numpy.float32)
        if len(shape) > 1:
            values = random.standard_normal(shape, dtype=numpy.float32) * numpy.float32(initializer_range)
        bits = values.view(numpy.uint32)
        # bfloat16 is the upper half of a float32, rounded to nearest even.
        tensor = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, offset + len(tensor))}
        tensors.append(tensor)
        offset += len(tensor)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(tensors))
