# SPDX-License-Identifier: Apache-2.0
"""docs/api.md against the gateway: what it says is what the code has, and nothing is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg.config import GatewayConfig
from disagg.errors import RequestError
from disagg.gateway.front.edge import Route
from disagg.gateway.front.fields import FORBIDDEN_FIELDS, STORE_FIELD
from disagg.pages import generate as docs
from disagg.pages.api import ERRORS, LIMITS, NOT_SERVED, refusals, routes
from disagg.sdk import types
from pools.client.request_fields import CHAT_ONLY, COMPLETIONS_ONLY, FIELDS

ROOT = Path(__file__).parents[4]
TEXT = (ROOT / docs.API_PAGE).read_text(encoding="utf-8")


def rows(first: str) -> list[str]:
    """The rows of tables whose first cell is this."""
    return [line for line in TEXT.splitlines() if line.startswith(f"| {first} |")]


def test_page_is_current() -> None:
    """docs/api.md is what the gateway's tables say."""
    assert docs.pages()[docs.API_PAGE] == TEXT, "run `python -m disagg.pages.generate`"


@pytest.mark.parametrize("route", routes(), ids=lambda route: f"{route.method} {route.path}")
def test_every_route_has_its_row(route: Route) -> None:
    """Each route of the table of routes is on the page once, with its key and with words for what it answers."""
    [row] = rows(f"`{route.method} {route.path.replace(':path', '')}`")
    _, _, key, words, _, _ = (cell.strip() for cell in row.split("|"))
    assert key in ("none", "client's", "admin") and words.endswith(".")


def test_what_is_not_served_is_no_route() -> None:
    """No path of the page's list of vLLM's other routes is one of the gateway's."""
    served = {route.path for route in routes()}
    assert not served & {path for paths in NOT_SERVED for path in paths}


def test_every_refusal_of_a_request_is_an_error_of_the_page() -> None:
    """The examples are refused as the page says, and every class of errors that are the client's fault has a row."""
    assert {type(error) for _, error in refusals()} <= ERRORS.keys()
    assert set(RequestError.__subclasses__()) <= ERRORS.keys()


def test_every_limit_is_a_setting_and_every_setting_of_a_limit_is_there() -> None:
    """The names are fields of `gateway`, and no field called `max_` is missing but the one that counts retries."""
    named = {name for name, _, _ in LIMITS if name is not None}
    assert named <= GatewayConfig.model_fields.keys()
    assert {name for name in GatewayConfig.model_fields if name.startswith("max_")} - named == {"max_attempts"}


def test_every_field_has_its_row() -> None:
    """vLLM's request fields, the one of ours, and what no client may send."""
    assert all(len(rows(f"`{name}`")) >= 1 for name in FIELDS)
    assert f"`{STORE_FIELD}`" in TEXT and all(f"`{name}`" in TEXT for name in FORBIDDEN_FIELDS)
    assert FIELDS.keys() >= CHAT_ONLY | COMPLETIONS_ONLY and not CHAT_ONLY & COMPLETIONS_ONLY


def test_every_field_of_the_admin_answers_has_its_row() -> None:
    """Those of pools, replicas and hand-offs that the SDK reads, each with words."""
    for model in (types.Pool, types.Replica, types.HandoffRecord):
        assert all(field.description for field in model.model_fields.values())
        assert all(rows(f"`{name}`") for name in model.model_fields)
