# SPDX-License-Identifier: Apache-2.0
"""Chunk digests are equal exactly for equal prefixes of the same salt."""

from __future__ import annotations

from transport.digests import chunk_digests


def test_known_value() -> None:
    """The form is fixed: engines of different starts and releases must agree."""
    assert chunk_digests([1, 2, 3, 4], 2) == ["cf2b2a5d15759756", "1404357252ba73a8"]


def test_only_full_chunks() -> None:
    """One digest of 16 hex digits a full chunk; the rest of the prompt has none."""
    digests = chunk_digests(list(range(10)), 4)
    assert [len(d) for d in digests] == [16, 16]
    assert chunk_digests([1, 2, 3], 4) == []


def test_a_digest_covers_the_whole_prefix() -> None:
    """Equal prefixes share digests up to the first difference, and none after it even when later chunks are equal."""
    first = chunk_digests([1, 2, 3, 4, 5, 6], 2)
    second = chunk_digests([1, 2, 9, 4, 5, 6], 2)
    assert first[0] == second[0]
    assert not set(first[1:]) & set(second[1:])


def test_salt_and_chunk_size_separate() -> None:
    """Another salt or another chunk size shares nothing; no salt and the empty one are the same."""
    tokens = [1, 2, 3, 4]
    assert chunk_digests(tokens, 2, None) == chunk_digests(tokens, 2, "")
    assert not set(chunk_digests(tokens, 2)) & set(chunk_digests(tokens, 2, "a"))
    assert not set(chunk_digests(tokens, 2)) & set(chunk_digests(tokens, 4))
