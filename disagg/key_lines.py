# SPDX-License-Identifier: Apache-2.0
"""The lines of a file of API keys, `name:key`. Pure. The config check and the gateway both use it."""

from __future__ import annotations

import re

MIN_KEY_CHARACTERS = 16
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(rf"[\x21-\x7e]{{{MIN_KEY_CHARACTERS},512}}")


def parse(text: str) -> list[tuple[str, str]]:
    """Name and key of each line `name:key`; empty lines and those that begin with # are left out.

    Raises ValueError, whose message has the number of the line and none of its text.
    """
    found: list[tuple[str, str]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, key = line.partition(":")
        if not colon:
            raise ValueError(f"line {number} is not name:key")
        if not _NAME.fullmatch(name):
            raise ValueError(f"line {number}: a name has 1 to 64 letters, digits, dots, hyphens and underscores")
        if not _KEY.fullmatch(key):
            raise ValueError(f"line {number}: a key has {MIN_KEY_CHARACTERS} to 512 ASCII characters and no space")
        if key in seen:
            raise ValueError(f"line {number} has the same key as line {seen[key]}")
        seen[key] = number
        found.append((name, key))
    if not found:
        raise ValueError("there is no key in it")
    return found
