# SPDX-License-Identifier: Apache-2.0
"""API keys: what a file of them may hold, who a header is, and what a change of the file does."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from disagg.config import EnvKeysConfig, FileKeysConfig, GatewayConfig
from disagg.errors import AuthenticationError, ConfigError
from disagg.gateway.front.api_keys import ApiKeys, keys_of
from disagg.gateway.front.tenants import Tenant
from disagg.key_lines import parse

ALICE, ALICE_2, BOB = "alice-0123456789abcdef", "alice:0123456789/second", "bob-0123456789abcdefgh"
LINES = f"# who may ask\n\nalice:{ALICE}\n  alice:{ALICE_2}\t\nbob:{BOB}\n"


def tenant_of(name: str, key: str) -> Tenant:
    return Tenant(name, f"salt-of-{name}")


def file_keys(path: Path, reloads: list[bool] | None = None) -> ApiKeys:
    taken = reloads if reloads is not None else []
    return ApiKeys(FileKeysConfig(type="file", path=str(path)), tenant_of, environment={}, on_reload=taken.append)


def who(keys: ApiKeys, key: str) -> str | None:
    try:
        return keys.tenant(b"Bearer " + key.encode()).name
    except AuthenticationError:
        return None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(LINES)
    return file


def test_lines() -> None:
    """A line is name and key; a key may hold colons, a name may come twice, comments and empty lines do not count."""
    assert parse(LINES) == [("alice", ALICE), ("alice", ALICE_2), ("bob", BOB)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no key"),
        ("# only this\n", "no key"),
        (f"a:{ALICE}\n{BOB}", "line 2 is not name:key"),
        (f"a b:{ALICE}", "line 1: a name"),
        (f":{ALICE}", "line 1: a name"),
        (f"{'a' * 65}:{ALICE}", "line 1: a name"),
        ("a:tooshort", "line 1: a key"),
        ("a:", "line 1: a key"),
        ("a:has a space in the key", "line 1: a key"),
        ("a:schlüssel-0123456789", "line 1: a key"),
        (f"a:{ALICE}\nb:{BOB}\nc:{ALICE}", "line 3 has the same key as line 1"),
    ],
)
def test_broken_lines(text: str, words: str) -> None:
    """What is no list of keys is refused with the number of the line, and nothing of the line itself."""
    with pytest.raises(ValueError, match=words) as caught:
        parse(text)
    for part in (ALICE, BOB, "tooshort", "schlüssel", "space in"):
        assert part not in str(caught.value)


def test_who_it_is(path: Path) -> None:
    """Each key is its tenant's, whatever the case of the scheme."""
    keys = file_keys(path)
    assert [who(keys, key) for key in (ALICE, ALICE_2, BOB)] == ["alice", "alice", "bob"]
    assert keys.tenant(b"bEARER  " + BOB.encode() + b" ") == Tenant("bob", "salt-of-bob")


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Basic " + ALICE.encode(),
        ALICE.encode(),
        b"Bearer alice:" + ALICE.encode(),
        b"Bearer " + ALICE.encode()[:-1],
        b"Bearer " + ALICE.encode() + b"x",
        b"Bearer " + ALICE.upper().encode(),
        b"Bearer \xff\xfe",
        b"Bearer " + ALICE.encode() + b" " + BOB.encode(),
    ],
)
def test_who_it_is_not(path: Path, header: bytes | None) -> None:
    """Anything else is refused with one and the same message."""
    with pytest.raises(AuthenticationError, match="missing or wrong API key") as caught:
        file_keys(path).tenant(header)
    assert ALICE not in str(caught.value)


def test_a_changed_file_is_taken_over(path: Path) -> None:
    """A look takes a new key and drops an old one; without a change it reads nothing."""
    reloads: list[bool] = []
    keys = file_keys(path, reloads)
    keys.look()
    assert reloads == []
    path.write_text(f"bob:{BOB}\ncarol:carol-0123456789abcdef\n")
    assert who(keys, ALICE) == "alice"
    keys.look()
    assert (who(keys, ALICE), who(keys, BOB), who(keys, "carol-0123456789abcdef")) == (None, "bob", "carol")
    assert reloads == [True]
    # Put in place by a rename, with the same size and time.
    other = path.with_name("other")
    other.write_text(path.read_text().replace("carol", "david"))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)
    keys.look()
    assert who(keys, "david-0123456789abcdef") == "david"


@pytest.mark.parametrize("broken", ["no colon here", "", b"\xff\xfe", None])
def test_a_broken_file_changes_nothing(path: Path, broken: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The old keys stay; it is said and counted once, without the file's words, and a mended file is taken over."""
    reloads: list[bool] = []
    keys = file_keys(path, reloads)
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    with caplog.at_level(logging.ERROR):
        keys.look()
        keys.look()
    assert (who(keys, ALICE), who(keys, BOB), reloads, len(caplog.records)) == ("alice", "bob", [False], 1)
    assert "no colon here" not in caplog.text
    path.write_text(f"bob:{BOB}\n")
    keys.look()
    assert (who(keys, ALICE), reloads) == (None, [False, True])


def test_a_file_that_could_not_be_read_is_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It need not change before it is taken over; the same trouble is said and counted once, another one again."""
    reloads: list[bool] = []
    keys = file_keys(path, reloads)
    path.write_text(f"bob:{BOB}\n")
    for trouble in (errno.EIO, errno.EIO, errno.ESTALE, errno.ESTALE):

        def fails(self: Path, trouble: int = trouble, **_: Any) -> str:
            raise OSError(trouble, os.strerror(trouble), str(self))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", fails)
            keys.look()
    assert (who(keys, ALICE), reloads, len(caplog.records)) == ("alice", [False, False], 2)
    keys.look()
    keys.look()
    assert (who(keys, ALICE), who(keys, BOB), reloads) == (None, "bob", [False, False, True])


def test_a_change_is_seen_by_its_ctime(path: Path) -> None:
    """Content of the same size with the old file's time, written in its place."""
    keys, before = file_keys(path), path.stat()
    path.write_text(path.read_text().replace("bob:", "rob:"))
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    keys.look()
    assert who(keys, BOB) == "rob"


def test_no_start_without_keys(tmp_path: Path) -> None:
    """A gateway whose keys are missing or broken does not start."""
    with pytest.raises(ConfigError, match="No such file"):
        file_keys(tmp_path / "none")
    (tmp_path / "broken").write_text(ALICE)
    with pytest.raises(ConfigError, match="line 1") as caught:
        file_keys(tmp_path / "broken")
    assert ALICE not in str(caught.value)
    config = EnvKeysConfig(type="env", variable="API_KEYS")
    with pytest.raises(ConfigError, match="API_KEYS is not set"):
        ApiKeys(config, tenant_of, environment={})
    keys = ApiKeys(config, tenant_of, environment={"API_KEYS": LINES})
    keys.look()
    assert who(keys, BOB) == "bob"


def test_nothing_shows_a_key(path: Path) -> None:
    """No representation of what holds keys has one in it, nor what would be enough to try keys out elsewhere."""
    keys = file_keys(path)
    assert ALICE not in repr(vars(keys)) and BOB not in repr(vars(keys))
    again = file_keys(path)
    assert not keys._table.keys() & again._table.keys()


def test_salts(path: Path, tmp_path: Path) -> None:
    """A salt is the tenant's: the same after a restart, another for each key without a secret, the same with one."""

    def salts(**fields: Any) -> list[str | None]:
        config = GatewayConfig(api_keys=FileKeysConfig(type="file", path=str(path)), **fields)
        keys = keys_of(config, {}, lambda ok: None)
        assert keys is not None
        return [keys.tenant(b"Bearer " + key.encode()).cache_salt for key in (ALICE, ALICE_2, BOB)]

    assert salts() == salts() and len({*salts()}) == 3
    (tmp_path / "secret").write_text("0123456789abcdef0123\n")
    (tmp_path / "other").write_text("0123456789abcdef0124\n")
    one, other = (salts(salt_secret_file=str(tmp_path / name)) for name in ("secret", "other"))
    assert one[0] == one[1] != one[2] and not {*one} & {*other}
    assert salts(cache_salt="shared") == [None, None, None]
    assert all(len(str(salt)) == 32 and str(salt).replace("-", "").replace("_", "").isalnum() for salt in salts())
    assert keys_of(GatewayConfig(), {}, lambda ok: None) is None
    for bad in ("none", "short"):
        (tmp_path / "short").write_text("x\n")
        with pytest.raises(ConfigError, match="salt_secret_file"):
            salts(salt_secret_file=str(tmp_path / bad))
