# SPDX-License-Identifier: Apache-2.0
"""Real engines with a tiny model of each KV layout: what the table of `transport.parts` says of `platform: cpu`.

`tests/prove/use_layouts.py` looks at every cell. These are the ones on which the others depend.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.layouts import (
    MODEL_OF,
    PROMPTS,
    TRANSPORTS,
    StartError,
    answer_all,
    answers_depend_on_kv,
    hand_over,
    keep_and_load,
    pair,
    running,
)
from tests.support.sink_stack import Server, lmcache_server
from transport.kv_layouts import KvLayout, State
from transport.parts import PARTS
from transport.tiers import OffloadConfig, Sink

NIXL = TRANSPORTS["nixl"]


def state(part: str, layout: KvLayout) -> State:
    """What the table says."""
    (found,) = (one for one in PARTS if one.name == part)
    return found.layouts["cpu"][layout].state


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with lmcache_server() as one:
        yield one


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints are written."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("layout", ["full_and_sliding_window", "mla_attention", "mamba"])
def test_a_pair_answers_as_one_engine(layout: KvLayout, models: Path) -> None:
    """Prompts much longer than a window are handed over by NIXL, and come back from host memory on the decode engine;
    the tokens are those of one engine."""
    tier = OffloadConfig(cpu_gib=0.25)
    with pair(MODEL_OF[layout], NIXL, models, decode_offload=tier) as (prefill, decode):
        assert answers_depend_on_kv(decode)
        handed = hand_over(prefill, decode, NIXL)
        print(f"handed over: {handed}")
        assert handed.num_wrong == 0 and handed.num_computed <= len(PROMPTS) + 1
        assert state("nixl", layout) == "works"
        loaded = keep_and_load(decode, decode, answer_all)
        print(f"from host memory: {loaded}")
        assert loaded.num_wrong == 0 and loaded.num_came > loaded.num_computed
        assert state("offload", layout) == "works"


@pytest.mark.parametrize(
    ("layout", "sink"),
    [("full_and_sliding_window", "off"), ("mla_attention", "unused")],
)
def test_the_shared_tier_refuses_in_its_own_words(layout: KvLayout, sink: Sink, models: Path, server: Server) -> None:
    """An engine ends at its start where the table says so, with the words of the component that the table names."""
    (part,) = (one for one in PARTS if one.name == f"shared_cache (sink: {sink})")
    known = part.layouts["cpu"][layout]
    assert known.state == "refused" and known.error
    with pytest.raises(StartError) as refused, running(MODEL_OF[layout], "prefill", NIXL, models, cache=(sink, server)):
        pass
    assert known.error in str(refused.value)


@pytest.mark.parametrize("layout", ["short_conv", "cross_attention"])
def test_nixl_refuses_in_its_own_words(layout: KvLayout, models: Path) -> None:
    """The same of the transport."""
    (part,) = (one for one in PARTS if one.name == "nixl")
    known = part.layouts["cpu"][layout]
    assert known.state == "refused" and known.error
    with pytest.raises(StartError) as refused, running(MODEL_OF[layout], "decode", NIXL, models):
        pass
    assert known.error in str(refused.value)


def test_one_group_goes_with_the_shared_tier(models: Path, server: Server) -> None:
    """Gemma 3 with the argument that `disagg check` names starts, and its KV comes back from the shared tier."""
    one_group = {"disable_hybrid_kv_cache_manager": True}
    with running("gemma3", "prefill", NIXL, models, cache=("write_through", server), engine_kwargs=one_group) as one:
        loaded = keep_and_load(one, one, answer_all)
        assert loaded.num_wrong == 0 and loaded.num_came > loaded.num_computed
