# SPDX-License-Identifier: Apache-2.0
"""Whether the transport and the tiers of a config can take the model's KV, by how vLLM groups it. Pure.

What is known of each part is in the table of `transport.parts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from disagg.advice.problems import Problem
from disagg.config import AppConfig
from pools.plan.checkpoint import Checkpoint
from pools.plan.launch import merged_engine_kwargs
from pools.plan.placement import parallel_size
from transport.descriptor import Feature
from transport.facts import Platform
from transport.kv_layouts import LAYOUTS, KvLayout
from transport.parts import Part, parts_of
from transport.transports import describe

_HYBRID = "disable_hybrid_kv_cache_manager"
_STAGES = "pipeline_parallel_size"
_IN_STAGES: dict[KvLayout, Feature] = {
    "full_and_sliding_window": "prefill_pipeline_sliding_window",
    "sliding_window": "prefill_pipeline_sliding_window",
    "mamba": "prefill_pipeline_mamba",
}


def kv_layout(checkpoint: Checkpoint, kwargs: Mapping[str, Any]) -> KvLayout:
    """How vLLM groups the KV of a model with these arguments.

    Source:
        vLLM 0.32 `unify_hybrid_kv_cache_specs`, `ModelConfig.__post_init__` (`disable_sliding_window`).
    """
    layout = checkpoint.kv_layout
    one_group = layout == "full_and_sliding_window" and kwargs.get(_HYBRID) is True
    no_window = layout in ("full_and_sliding_window", "sliding_window") and kwargs.get("disable_sliding_window") is True
    return "full_attention" if one_group or no_window else layout


def check_layouts(config: AppConfig, checkpoint: Checkpoint, prefix: str) -> list[Problem]:
    """The model's KV against the transport, then against each tier: what refuses it, does less, or was never seen."""
    layout = kv_layout(checkpoint, config.model.engine_kwargs)
    transport, *tiers = parts_of(config.transport, config.offload, config.shared_cache)
    problems = _check_part(transport, layout, config.platform, prefix)
    if any(problem.severity == "error" for problem in problems):
        return problems
    for tier in tiers:
        problems += _check_part(tier, layout, config.platform, prefix)
    return problems + _check_manager(config, layout, prefix) + _check_stages(config, layout, prefix)


def _check_part(part: Part, layout: KvLayout, platform: Platform, prefix: str) -> list[Problem]:
    known, path = part.layouts[platform][layout], f"{prefix}.{part.field}"
    clause = LAYOUTS[layout].clause
    if known.state == "refused":
        taken = [LAYOUTS[one].title for one, known in part.layouts[platform].items() if known.state != "refused"]
        return [Problem(path, f"{clause}; {known.message}", f"models with {', '.join(taken)}", known.action)]
    if known.state == "partly":
        return [Problem(path, f"{clause}; {known.message}", action=known.action, severity="warning")]
    # Every part is made for full attention. Where nobody has seen it, that is the platform's doing, not the model's.
    if known.state == "unseen" and layout != "full_attention":
        message = f"{clause}, which is untested with {part.name} on platform {platform}"
        message += f"; {known.message}" if known.message else ""
        action = known.action or "compare answers with and without it before you rely on it"
        return [Problem(path, message, action=action, severity="warning")]
    return []


def _check_manager(config: AppConfig, layout: KvLayout, prefix: str) -> list[Problem]:
    """vLLM cannot make one group of states and of keys and values."""
    if layout not in ("mamba", "short_conv") or config.model.engine_kwargs.get(_HYBRID) is not True:
        return []
    path = f"{prefix}.model.engine_kwargs.{_HYBRID}"
    message = f"{LAYOUTS[layout].clause}; vLLM cannot make one group of them"
    return [Problem(path, message, "false", "remove it")]


def _check_stages(config: AppConfig, layout: KvLayout, prefix: str) -> list[Problem]:
    """What the transport says of prefill engines in pipeline stages, beside what `fit` says of every model."""
    kwargs = merged_engine_kwargs(config.model, config.prefill, config.platform)
    feature = _IN_STAGES.get(layout)
    limit = describe(config.transport).limits.get(feature) if feature else None
    if limit is None or parallel_size(kwargs, _STAGES) == 1:
        return []
    place = "prefill" if _STAGES in config.prefill.engine_kwargs else "model"
    severity: Literal["error", "warning"] = "error" if limit.refused else "warning"
    path = f"{prefix}.{place}.engine_kwargs.{_STAGES}"
    return [Problem(path, f"{LAYOUTS[layout].clause}; {limit.message}", "1", "use tensor_parallel_size", severity)]
