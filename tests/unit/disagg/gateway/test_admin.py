# SPDX-License-Identifier: Apache-2.0
"""The admin key, and what the admin API answers."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from disagg.config import AdminConfig, GatewayConfig
from disagg.errors import AuthenticationError, ConflictError, PermissionDeniedError
from disagg.gateway.front.admin_key import AdminKey
from tests.support.gateway_stack import FAST, Replica, Stack, running_stack

SCALE = "/admin/v1/pools/decode/scale"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("  secret-1\n")
    return path


@pytest.mark.parametrize("given", [b"Bearer secret-1", b"bearer secret-1", b"BEARER  secret-1 "])
def test_right_key(key_file: Path, given: bytes) -> None:
    """The key passes, whatever the case of the scheme and the blanks around."""
    AdminKey(str(key_file)).check(given)


@pytest.mark.parametrize(
    "given",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer secret",
        b"Bearer secret-12",
        b"Basic secret-1",
        b"secret-1",
        b"\xff\xfe",
    ],
)
def test_wrong_key(key_file: Path, given: bytes | None) -> None:
    """Anything else is refused."""
    with pytest.raises(AuthenticationError):
        AdminKey(str(key_file)).check(given)


def test_no_key_to_match(tmp_path: Path) -> None:
    """Without a readable key nobody gets in, an empty key neither."""
    binary, empty, blank = tmp_path / "binary", tmp_path / "empty", tmp_path / "blank"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_text("")
    blank.write_text(" \n")
    for path, words in {
        None: "set gateway.admin.key_file",
        "": "set gateway.admin.key_file",
        str(tmp_path / "missing"): "No such file",
        str(tmp_path): "directory",
        str(binary): "not text",
        str(empty): "empty",
        str(blank): "empty",
    }.items():
        for given in (b"Bearer ", b"Bearer None", None):
            with pytest.raises(PermissionDeniedError, match=words):
                AdminKey(path).check(given)


def test_key_is_replaced_without_a_restart(key_file: Path) -> None:
    """The file is read at each use."""
    key = AdminKey(str(key_file))
    key.check(b"Bearer secret-1")
    key_file.write_text("secret-2")
    key.check(b"Bearer secret-2")
    with pytest.raises(AuthenticationError):
        key.check(b"Bearer secret-1")
    key_file.unlink()
    with pytest.raises(PermissionDeniedError):
        key.check(b"Bearer secret-2")


def test_key_is_compared_in_constant_time(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long the comparison takes tells nothing about the key."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    with pytest.raises(AuthenticationError):
        AdminKey(str(key_file)).check(b"Bearer secret-1")
    assert compared == [(b"secret-1", b"secret-1")]


@pytest.fixture
async def stack(key_file: Path) -> AsyncIterator[Stack]:
    config = GatewayConfig(admin=AdminConfig(key_file=str(key_file)))
    async with running_stack(num_prefill=1, num_decode=2, config=config) as running:
        yield running


HEADERS: Sequence[tuple[str, str]] = [("authorization", "Bearer secret-1"), ("content-type", "application/json")]


async def pools(stack: Stack) -> dict[str, Any]:
    reply = await stack.call("GET", "/admin/v1/pools", None, HEADERS)
    assert reply.status == 200
    return {pool["name"]: pool for pool in reply.json()["pools"]}


async def test_pools(stack: Stack) -> None:
    """Sizes, states and load of every replica."""
    stack.scaler.sizes = {"prefill": 1, "decode": None}
    seen = await pools(stack)
    assert (seen["prefill"]["target_num_replicas"], seen["decode"]["target_num_replicas"]) == (1, None)
    assert (seen["prefill"]["num_routable"], seen["decode"]["num_routable"]) == (1, 2)
    replica = seen["decode"]["replicas"][0]
    assert replica.keys() >= {
        "replica_id",
        "engine_id",
        "incarnation",
        "state",
        "url",
        "warm_peers",
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_in_flight",
        "kv_cache_usage",
        "uptime_s",
    }
    assert (replica["replica_id"], replica["state"], replica["warm_peers"]) == ("d0", "routable", ["p0"])
    assert replica["num_requests_running"] == 0


async def test_states(stack: Stack) -> None:
    """A replica that is not warm yet is warming, one that does not answer is unreachable."""
    joined = Replica("prefill", "p1", FAST)
    await joined.start()

    async def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("not yet")

    joined.engine.probe = broken  # type: ignore[method-assign,assignment]
    stack.prefill.append(joined)
    stack.announce()
    stack.decode[1].kill()
    seen = await pools(stack)
    assert [r["state"] for r in seen["prefill"]["replicas"]] == ["routable", "warming"]
    assert [r["state"] for r in seen["decode"]["replicas"]] == ["routable", "unreachable"]
    assert (seen["prefill"]["num_routable"], seen["decode"]["num_routable"]) == (1, 1)


async def test_scale(stack: Stack) -> None:
    """A size reaches the scaler and is confirmed; its refusal reaches the client."""
    for number in (1, 1024):
        reply = await stack.call("POST", SCALE, {"num_replicas": number}, HEADERS)
        assert (reply.status, reply.json()) == (202, {"name": "decode", "target_num_replicas": number})
        assert stack.scaler.sizes["decode"] == number
    stack.scaler.error = ConflictError("set external_scaler_enabled")
    refused = await stack.call("POST", SCALE, {"num_replicas": 2}, HEADERS)
    assert (refused.status, refused.json()["error"]["message"]) == (409, "set external_scaler_enabled")
    assert stack.scaler.sizes["decode"] == 1024


async def test_admin_is_off_without_a_key_file() -> None:
    """Without a key file nobody can read or scale."""
    async with running_stack(num_prefill=0) as stack:
        for method, path in (("GET", "/admin/v1/pools"), ("POST", SCALE)):
            assert (await stack.call(method, path, {"num_replicas": 3}, HEADERS)).status == 403
        assert stack.scaler.sizes["decode"] is None
