# SPDX-License-Identifier: Apache-2.0
"""How vLLM groups the KV of a model's layers, and what can be known of a part that moves or keeps KV. Values only.

The descriptors of transports and the modules of tiers say what is known of them. `transport.parts` makes the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from transport.facts import Platform

KvLayout = Literal[
    "full_attention",
    "full_and_sliding_window",
    "sliding_window",
    "mla_attention",
    "mamba",
    "short_conv",
    "cross_attention",
]
"""In vLLM's names for kinds of KV caches.

Source:
    vLLM 0.32 `KVCacheSpecKind`, `get_kv_cache_groups`, `MambaAttentionBackendEnum`.
"""


@dataclass(frozen=True)
class Description:
    """A layout in words, for whoever reads the table or a message."""

    title: str
    groups: str
    """What vLLM keeps, in how many groups."""
    models: str
    clause: str
    """The same of one model, in a message."""


LAYOUTS: dict[KvLayout, Description] = {
    "full_attention": Description(
        "full attention",
        "one group: each layer keeps every token",
        "Llama 2 and 3, Qwen3; Llama 4, for which vLLM turns its hybrid KV cache manager off",
        "all layers of the model keep every token",
    ),
    "full_and_sliding_window": Description(
        "full + sliding window",
        "several groups: one keeps every token, others a window",
        "Gemma 2 and 3, gpt-oss, Cohere 2, OLMo 3",
        "some layers of the model have a sliding window, so vLLM keeps its KV in several groups",
    ),
    "sliding_window": Description(
        "sliding window",
        "one group: each layer keeps a window",
        "Mistral 7B v0.1",
        "all layers of the model have a sliding window",
    ),
    "mla_attention": Description(
        "MLA",
        "one group: each layer keeps a latent of every token",
        "DeepSeek V2 and V3, Kimi K2",
        "the model keeps latents in place of keys and values (MLA)",
    ),
    "mamba": Description(
        "Mamba, Gated DeltaNet",
        "several groups: one keeps every token, others a state",
        "Jamba, Nemotron-H, Qwen3-Next, Qwen3.5, Kimi Linear",
        "some layers of the model keep a state (Mamba, linear attention), so vLLM keeps its KV in several groups",
    ),
    "short_conv": Description(
        "short convolution, lightning attention",
        "several groups: one keeps every token, others a state",
        "LFM2, Ling 2.5",
        "some layers of the model keep a state (short convolution, lightning attention), so vLLM keeps its KV in "
        "several groups",
    ),
    "cross_attention": Description(
        "cross-attention",
        "several groups: of the decoder, and of what the encoder made",
        "Whisper and other encoder-decoders",
        "the model is an encoder-decoder",
    ),
}

KV_LAYOUTS: tuple[KvLayout, ...] = get_args(KvLayout)

State = Literal["works", "partly", "refused", "unseen"]
"""`works`: seen on real engines, whose answers are those of one engine alone. `partly`: seen, and it does less than its
setting says. `refused`: an engine ends at its start, or fails. `unseen`: no component refuses it, and nobody has run it
here."""


@dataclass(frozen=True)
class Known:
    """What is known of one part, one layout and one platform."""

    state: State
    message: str = ""
    """Why, or what else there is to know."""
    action: str = ""
    """What to do where it is refused or does less."""
    error: str = ""
    """The component's own words, as they stand in the engine's log, where an engine ends at its start."""


Layouts = Mapping[Platform, Mapping[KvLayout, Known]]
"""What is known of one part. Each platform has every layout."""


def on_both(cpu: Mapping[KvLayout, Known], cuda: Mapping[KvLayout, Known]) -> Layouts:
    """What is known of one part. A layout that is not named works on `cpu`, and is unseen on `cuda`."""
    named: dict[Platform, tuple[Known, Mapping[KvLayout, Known]]] = {"cpu": (WORKS, cpu), "cuda": (UNSEEN, cuda)}
    return {platform: {one: known.get(one, rest) for one in KV_LAYOUTS} for platform, (rest, known) in named.items()}


WORKS = Known("works")
UNSEEN = Known("unseen")

MLA_ON_CPU = Known(
    "works",
    "vLLM's CPU build computes something else from latents that it kept than from a whole prompt, so an answer can be "
    "another than that of one engine",
)
"""An engine alone shows it, too: a prompt that ends with the first tokens of an answer goes on otherwise.

Source: vLLM 0.32 `CPUMLAImpl.forward_mqa`, `CPUSDPAMLAPrefillBackend`.
"""

NO_CONVOLUTION_OVER_NIXL = Known(
    "refused",
    "vLLM 0.32 moves no states but those of Mamba and Gated DeltaNet over NIXL",
    "set transport: {type: mooncake}",
    "Conv transfer only supports Mamba1, Mamba2 and GDN models",
)
"""Source: vLLM 0.32 `derive_mamba_conv_split`."""

NO_ENCODER_DECODER = Known(
    "refused",
    "vLLM 0.32 refuses every KV connector for encoder-decoders",
    "serve it with vLLM alone",
    "Encoder-decoder models are not currently supported with KV connectors",
)
"""Source: vLLM 0.32 `Scheduler.__init__`."""

NIXL_LAYOUTS = on_both(
    cpu={"mla_attention": MLA_ON_CPU, "short_conv": NO_CONVOLUTION_OVER_NIXL, "cross_attention": NO_ENCODER_DECODER},
    cuda={"short_conv": NO_CONVOLUTION_OVER_NIXL, "cross_attention": NO_ENCODER_DECODER},
)
"""What is known of NIXL, which moves the same KV whichever engine begins."""
