# SPDX-License-Identifier: Apache-2.0
"""A short form of line 8 of `make prove-tiers`: files behind LMCache outlive the application that wrote them."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.conftest import FILES, Expected, take_mooncake
from tests.prove.tiers_durable import SHARE, from_lmcache
from tests.support.slot import Slot
from tests.support.stack import Stack, wait_until
from tests.support.tiers import CHUNK, asked, full_chunks, orphan, wrong


def test_a_second_life_serves_the_first_ones_prompts(
    real_stack: Stack, expected: Expected, slot: Slot, files: dict[str, str]
) -> None:
    """Prompts that the first life rescued are loaded by another application, over the other transport.

    The last test of its application, because it ends it.
    """
    chosen, answers = expected.kept
    tokens = sum(full_chunks(case.body["prompt"]) for case in chosen)
    written = _num_files()
    orphan(real_stack, [case.body["prompt"] for case in chosen])
    wait_until(lambda: _num_files() >= written + tokens // CHUNK, 30, "each chunk is in a file")
    second = take_mooncake(slot, files)
    assert real_stack.process.returncode == 0, real_stack.output[-20:]
    assert wrong(answers, asked(second.url, chosen)) == []
    assert from_lmcache(second) >= SHARE * tokens


def _num_files() -> int:
    """Files of whole chunks. LMCache renames each when it is written."""
    return len(list(Path(FILES).rglob("*.data")))
