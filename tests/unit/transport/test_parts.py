# SPDX-License-Identifier: Apache-2.0
"""The table of KV layouts: whole, and with words wherever something is to be said."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from transport.config import MooncakeConfig, NixlConfig
from transport.facts import Platform
from transport.kv_layouts import KV_LAYOUTS, LAYOUTS
from transport.parts import PARTS, Part, parts_of
from transport.tiers import OffloadConfig, SharedCacheConfig, Sink

EVERY = pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)


def test_every_layout_is_described() -> None:
    """Each has a title, its groups, models and a clause, none of them twice."""
    assert tuple(LAYOUTS) == KV_LAYOUTS
    for field in ("title", "groups", "models", "clause"):
        told = [getattr(one, field) for one in LAYOUTS.values()]
        assert all(told)
        assert field == "groups" or len(set(told)) == len(told)


@EVERY
def test_a_part_knows_every_cell(part: Part) -> None:
    """Both platforms have every layout, and what is refused or does less says why and what to do."""
    assert set(part.layouts) == set(get_args(Platform))
    for cells in part.layouts.values():
        assert tuple(cells) == KV_LAYOUTS
        for known in cells.values():
            if known.state in ("refused", "partly"):
                assert known.message and known.action
            assert bool(known.error) == (known.state == "refused")


@EVERY
def test_nothing_is_said_to_work_that_was_not_seen(part: Part) -> None:
    """No engine has run on a GPU here, and every cell of CPUs was looked at."""
    assert {known.state for known in part.layouts["cuda"].values()} <= {"refused", "unseen"}
    assert "unseen" not in {known.state for known in part.layouts["cpu"].values()}


@pytest.mark.parametrize(
    ("transport", "offload", "cache", "names"),
    [
        (NixlConfig(), None, None, ["nixl"]),
        (NixlConfig(mode="push"), {"cpu_gib": 1}, None, ["nixl-push", "offload"]),
        (
            MooncakeConfig(type="mooncake"),
            {"cpu_gib": 1, "disk": {"path": "kv"}},
            {"sink": "evicted"},
            ["mooncake", "offload.disk", "shared_cache (sink: evicted)"],
        ),
    ],
)
def test_the_parts_of_an_application(
    transport: Any, offload: dict[str, Any] | None, cache: dict[str, Any] | None, names: list[str]
) -> None:
    """They are its transport and its tiers, all of them in the table."""
    found = parts_of(
        transport,
        OffloadConfig.model_validate(offload) if offload else None,
        SharedCacheConfig.model_validate(cache) if cache else None,
    )
    assert [part.name for part in found] == names
    assert {part.name for part in found} <= {part.name for part in PARTS}


def test_every_sink_is_in_the_table() -> None:
    """Each has a row of its own."""
    names = {part.name for part in PARTS}
    assert {f"shared_cache (sink: {sink})" for sink in get_args(Sink)} <= names
