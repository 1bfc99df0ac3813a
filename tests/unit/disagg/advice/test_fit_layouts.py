# SPDX-License-Identifier: Apache-2.0
"""The model's KV against transport and tiers: an error where it cannot work, a warning where nobody knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from disagg.advice.fit_layouts import check_layouts, kv_layout
from disagg.advice.problems import Problem
from disagg.config import AppConfig
from pools.plan.checkpoint import Checkpoint
from transport.kv_layouts import KvLayout

MODEL = Checkpoint(4, 2, 4096, None, 1, has_tokenizer=True)
PUSH = {"type": "nixl", "mode": "push"}
MOONCAKE = {"type": "mooncake"}


def config(kwargs: dict[str, Any] | None = None, **more: Any) -> AppConfig:
    return AppConfig.model_validate(
        {"model": {"id": "m", "source": "m", "engine_kwargs": kwargs or {}}, "platform": "cpu", **more}
    )


def check(layout: KvLayout, kwargs: dict[str, Any] | None = None, **more: Any) -> list[Problem]:
    return check_layouts(config(kwargs, **more), replace(MODEL, kv_layout=layout), "args")


def told(problems: Iterable[Problem]) -> list[tuple[str, str]]:
    return [(problem.path, problem.severity) for problem in problems]


@pytest.mark.parametrize(
    ("layout", "kwargs", "expected"),
    [
        ("full_and_sliding_window", {}, "full_and_sliding_window"),
        ("full_and_sliding_window", {"disable_hybrid_kv_cache_manager": False}, "full_and_sliding_window"),
        ("full_and_sliding_window", {"disable_hybrid_kv_cache_manager": True}, "full_attention"),
        ("full_and_sliding_window", {"disable_sliding_window": True}, "full_attention"),
        ("sliding_window", {"disable_hybrid_kv_cache_manager": True}, "sliding_window"),
        ("sliding_window", {"disable_sliding_window": True}, "full_attention"),
        ("mamba", {"disable_hybrid_kv_cache_manager": True}, "mamba"),
    ],
)
def test_arguments_that_change_the_layout(layout: KvLayout, kwargs: dict[str, Any], expected: str) -> None:
    """One group is made of full attention and windows, but neither of windows alone nor of states."""
    assert kv_layout(replace(MODEL, kv_layout=layout), kwargs) == expected


@pytest.mark.parametrize("more", [{}, {"transport": PUSH}, {"transport": MOONCAKE}], ids=["pull", "push", "mooncake"])
@pytest.mark.parametrize(
    "layout", ["full_attention", "full_and_sliding_window", "sliding_window", "mla_attention", "mamba"]
)
def test_what_works_is_not_spoken_of(layout: KvLayout, more: dict[str, Any]) -> None:
    """On CPUs every transport and host memory with a disk take these layouts."""
    assert check(layout, **more, offload={"cpu_gib": 1, "disk": {"path": "kv"}}) == []


@pytest.mark.parametrize("layout", ["full_and_sliding_window", "mamba", "short_conv"])
def test_several_groups_do_not_go_with_the_shared_tier_on_cpus(layout: KvLayout) -> None:
    """Each sink is refused; without the tier nothing is."""
    for sink in ("off", "unused", "evicted", "write_through"):
        (problem,) = check(layout, transport=MOONCAKE, shared_cache={"sink": sink})
        assert (problem.path, problem.severity) == ("args.shared_cache", "error")
        assert "in several groups; LMCache 0.5.6 takes one" in problem.message
        assert problem.allowed == "models with full attention, sliding window" + (", MLA" if sink == "off" else "")
        assert problem.action and "remove shared_cache" in problem.action
    assert check(layout, transport=MOONCAKE) == []


def test_one_group_is_made_by_an_argument() -> None:
    """A layout of full attention and windows goes with the shared tier when vLLM's hybrid manager is off."""
    assert check("full_and_sliding_window", {"disable_hybrid_kv_cache_manager": True}, shared_cache={}) == []


def test_states_need_the_hybrid_manager() -> None:
    """vLLM ends at its start without it, whatever the transport and the tiers."""
    (problem,) = check("mamba", {"disable_hybrid_kv_cache_manager": True})
    assert (problem.path, problem.severity) == (
        "args.model.engine_kwargs.disable_hybrid_kv_cache_manager",
        "error",
    )


def test_latents_and_the_shared_tier_on_cpus() -> None:
    """A sink is refused, because an engine would not start; a tier that is only read has nothing to give."""
    assert told(check("mla_attention", shared_cache={"sink": "write_through"})) == [("args.shared_cache", "error")]
    assert told(check("mla_attention", shared_cache={"sink": "off"})) == [("args.shared_cache", "warning")]


def test_sinks_that_store_nothing() -> None:
    """Of a model whose layers all have a window, two sinks store no long prompt, and one does."""
    for sink in ("unused", "evicted"):
        (problem,) = check("sliding_window", shared_cache={"sink": sink})
        assert (problem.path, problem.severity) == ("args.shared_cache", "warning")
        assert "store nothing of a longer prompt" in problem.message
    assert check("sliding_window", shared_cache={"sink": "write_through"}) == []


@pytest.mark.parametrize("more", [{}, {"transport": PUSH}], ids=["pull", "push"])
def test_short_convolutions_do_not_go_over_nixl(more: dict[str, Any]) -> None:
    """Both modes are refused on both platforms, and the transport that takes them is named."""
    for platform in ("cpu", "cuda"):
        (problem,) = check("short_conv", platform=platform, **more)
        assert (problem.path, problem.severity) == ("args.transport", "error")
        assert problem.action == "set transport: {type: mooncake}"


def test_an_encoder_decoder_is_one_error() -> None:
    """No transport takes it, so the tiers are not spoken of."""
    problems = check("cross_attention", offload={"cpu_gib": 1}, shared_cache={})
    assert told(problems) == [("args.transport", "error")]


def test_gpus_were_not_seen() -> None:
    """There is a warning for each part, but none for full attention, for which every part is made."""
    tiers = {"offload": {"cpu_gib": 1}, "shared_cache": {}}
    assert told(check("mamba", platform="cuda", **tiers)) == [
        ("args.transport", "warning"),
        ("args.offload", "warning"),
        ("args.shared_cache", "warning"),
    ]
    assert check("full_attention", platform="cuda", **tiers) == []


@pytest.mark.parametrize(
    ("layout", "transport", "expected"),
    [
        ("full_attention", {"type": "nixl"}, []),
        ("mla_attention", {"type": "nixl"}, []),
        ("full_and_sliding_window", {"type": "nixl"}, ["error"]),
        ("sliding_window", {"type": "nixl"}, ["error"]),
        ("mamba", {"type": "nixl"}, ["error"]),
        ("full_and_sliding_window", PUSH, []),
        ("mamba", PUSH, ["error"]),
        ("mamba", MOONCAKE, []),
    ],
)
def test_prefill_engines_in_stages(layout: KvLayout, transport: dict[str, Any], expected: list[str]) -> None:
    """Pulling takes stages of one group alone, pushing also those with windows; the field is the one that set it."""
    stages = {"engine_kwargs": {"pipeline_parallel_size": 2}}
    problems = check(layout, transport=transport, prefill=stages)
    path = "args.prefill.engine_kwargs.pipeline_parallel_size"
    assert told(problems) == [(path, severity) for severity in expected]
