# SPDX-License-Identifier: Apache-2.0
"""Whose caches a request uses: its salt, put into the body."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg.errors import InvalidRequestError
from disagg.gateway.front.tenants import Tenant, check_media_ids, mixed, salt_of, salted

ALICE, BOB = (Tenant(name, salt_of(b"secret", name)) for name in ("alice", "bob"))


def both(text: bytes, tenant: Tenant = ALICE) -> tuple[dict[str, Any], bytes]:
    """The body after salting, and its bytes."""
    body = json.loads(text)
    raw = salted(body, text, tenant)
    assert json.loads(raw) == body
    return body, raw


def test_a_salt_is_the_name_under_a_secret() -> None:
    """The same for the same, different for another name or secret, short and plain."""
    assert salt_of(b"secret", "alice") == ALICE.cache_salt != salt_of(b"secrez", "alice")
    assert ALICE.cache_salt != BOB.cache_salt
    assert len(ALICE.cache_salt or "") == 32


@pytest.mark.parametrize("before", [b"{", b" \t\r\n{", b"{ "])
def test_the_bytes_of_the_client_stay(before: bytes) -> None:
    """Without a salt of its own the client's bytes follow the field, escapes, spaces and all."""
    rest = b'"model":"m", "prompt" : "\\u00e9 { \xc3\xa9","x":1.0e0 }'
    body, raw = both(before + rest)
    assert raw.endswith(rest) and body["cache_salt"] == ALICE.cache_salt
    assert raw.count(b"cache_salt") == 1


def test_nothing_happens_without_tenants() -> None:
    """Tenants that share KV: the very same bytes, and the client's salt as it came."""
    text = b'{"model": "m", "cache_salt": "mine"}'
    body, raw = both(text, Tenant("alice"))
    assert raw is text and body["cache_salt"] == "mine"


@pytest.mark.parametrize("key", ["cache_salt", "cache_\\u0073alt"])
def test_a_salt_of_the_client_divides_its_own(key: str) -> None:
    """It is mixed in, so that it can neither name another tenant's salt nor leave one's own."""
    assert ALICE.cache_salt is not None
    body, raw = both(f'{{"model":"m","{key}":"mine"}}'.encode())
    assert body["cache_salt"] == mixed(ALICE.cache_salt, "mine")
    assert raw.count(b"cache_salt") == 1 and b"mine" not in raw
    texts = [b'{"model":"m","cache_salt":"%b"}' % salt for salt in (b"a", b"b")]
    salts = {both(text, tenant)[0]["cache_salt"] for text in texts for tenant in (ALICE, BOB)}
    assert len(salts | {ALICE.cache_salt, BOB.cache_salt}) == 6
    stolen, _ = both(json.dumps({"model": "m", "cache_salt": ALICE.cache_salt}).encode(), BOB)
    assert stolen["cache_salt"] not in (ALICE.cache_salt, BOB.cache_salt)


def test_null_is_no_salt() -> None:
    """A null would win over the field in front, so the body is written anew."""
    body, raw = both(b'{"model":"m","cache_salt":null}')
    assert body["cache_salt"] == ALICE.cache_salt and b"null" not in raw
    twice, _ = both(b'{"model":"m","cache_salt":"x","cache_salt":null}')
    assert twice["cache_salt"] == ALICE.cache_salt


@pytest.mark.parametrize("value", ["", 1, True, [], {}, ["x"]])
def test_no_salt_at_all(value: Any) -> None:
    """What vLLM takes for none is refused here."""
    with pytest.raises(InvalidRequestError) as caught:
        salted({"model": "m", "cache_salt": value}, b"...", ALICE)
    assert caught.value.param == "cache_salt"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


@pytest.mark.parametrize("part", [{**IMAGE, "uuid": "x"}, {"image_url": None, "uuid": "x"}, {"uuid": ""}, {"uuid": 1}])
def test_media_are_not_named_by_a_client(part: Any) -> None:
    """An id of the client's own is refused wherever it stands, since engines keep media under it for all tenants."""
    body = {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [IMAGE, part]}]}
    with pytest.raises(InvalidRequestError) as caught:
        check_media_ids(body, ALICE)
    assert caught.value.param == "messages[1].content[1].uuid"
    check_media_ids(body, Tenant("alice"))


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "a",
        [],
        ["a", None, {}, {"content": None}, {"content": "uuid"}, {"content": {"uuid": "x"}}],
        [{"content": [IMAGE, {**IMAGE, "uuid": None}, "uuid", None, ["uuid"]]}, {"uuid": "x", "content": "a"}],
    ],
)
def test_media_without_ids_pass(messages: Any) -> None:
    """Parts without an id, and whatever is no part at all, are left to the engine."""
    check_media_ids({"messages": messages}, ALICE)
    check_media_ids({"prompt": "a"}, ALICE)


def test_odd_text_has_a_salt() -> None:
    """Any text of the client is taken, a lone surrogate too."""
    assert len(mixed("s", "\ud800/@\x00" + "x" * 1000)) == 32
