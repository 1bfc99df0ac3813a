# SPDX-License-Identifier: Apache-2.0
"""The names of hand-off parameters: what they are on the wire, and that one module alone spells them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from transport.handoff_params import (
    HANDOFF_ID,
    MAX_OFFLOAD_TOKENS,
    NOT_STORED,
    REMOTE_DECODE,
    STORE,
    handoff_id_of,
    is_warm_up,
    offer_params,
    settle_params,
    warm_up_id,
)

ROOT = Path(__file__).resolve().parents[3]
NAMES = {
    "disagg.handoff_id",
    "disagg.settle",
    "disagg.store",
    "do_remote_decode",
    "do_remote_prefill",
    "lmcache.max_offload_tokens",
}
SPELLED_IN = {"transport/handoff_params.py", "tests/unit/transport/test_handoff_params.py"}


def spelled(path: Path) -> set[str]:
    """The names of hand-off parameters that a module holds as strings."""
    text = path.read_text(encoding="utf-8")
    if not any(name in text for name in NAMES):
        return set()
    tree = ast.parse(text)
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in NAMES}


def test_one_module_spells_them() -> None:
    """In no other module of the packages, the tests or the benchmarks is one of them a string."""
    found = {
        path.relative_to(ROOT).as_posix(): names
        for folder in ("disagg", "pools", "transport", "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if (names := spelled(path))
    }
    assert found.pop("transport/handoff_params.py") == NAMES
    assert found.keys() <= SPELLED_IN


def test_an_offer_names_the_handoff_and_what_the_client_said() -> None:
    """Every offer carries its id; only a client that said something changes what is stored."""
    plain = {"do_remote_decode": True, "do_remote_prefill": False, "disagg.handoff_id": "g-1"}
    assert offer_params("g-1") == plain == {**REMOTE_DECODE, HANDOFF_ID: "g-1"}
    assert offer_params("g-1", "always") == {**plain, STORE: "always"}
    never = {"disagg.store": "never", "lmcache.max_offload_tokens": 0}
    assert offer_params("g-1", "never") == {**plain, **never} == {**plain, **NOT_STORED}
    assert MAX_OFFLOAD_TOKENS not in offer_params("g-1", "always")


def test_a_settle_request_names_the_handoffs() -> None:
    """The ids that nobody will read are its one parameter."""
    assert settle_params(("h-1", "h-2")) == {"disagg.settle": ["h-1", "h-2"]}


@pytest.mark.parametrize(("params", "expected"), [({HANDOFF_ID: "h-1"}, "h-1"), ({}, "r-1"), ({HANDOFF_ID: ""}, "r-1")])
def test_a_leg_without_an_id_goes_by_the_engines_name(params: dict[str, str], expected: str) -> None:
    """The gateway's id where there is one, else what the engine calls it."""
    assert handoff_id_of(params, "r-1") == expected


def test_a_warm_up_is_told_by_its_id() -> None:
    """What `warm_up_id` makes is a warm-up, and an id of the gateway's requests is none."""
    assert is_warm_up(warm_up_id("0123"))
    assert not is_warm_up("0123456789ab-1")
