# SPDX-License-Identifier: Apache-2.0
"""Whether the files and variables for keys hold keys. Reads them, and repeats nothing of what they hold.

A file or variable that is missing here may exist on the nodes that need it, so it is only a warning. A gateway or a
replica that lacks it refuses to start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from disagg.advice.problems import Problem
from disagg.config import AppConfig, FileKeysConfig
from disagg.key_lines import MIN_KEY_CHARACTERS, parse
from pools.replica.engine_key import usable_key

_LINES = "lines of name:key"


def check_keys(config: AppConfig, environment: Mapping[str, str], prefix: str) -> list[Problem]:
    """Problems of API keys, of the secret of the salts and of the engines' key."""
    problems = _api_keys(config, environment, f"{prefix}.gateway.api_keys")
    if (file := config.gateway.salt_secret_file) is not None:
        long_enough = f"at least {MIN_KEY_CHARACTERS} characters"
        problems += _file(
            file,
            f"{prefix}.gateway.salt_secret_file",
            lambda text: None if len(text.strip()) >= MIN_KEY_CHARACTERS else "is too short",
            allowed=long_enough,
            who="every gateway replica",
        )
    if (file := config.engine_key_file) is not None:
        problems += _file(
            file,
            f"{prefix}.engine_key_file",
            lambda text: None if usable_key(text) else "holds no key",
            allowed="one key without spaces",
            who="every replica of the pools",
        )
    return problems


def _api_keys(config: AppConfig, environment: Mapping[str, str], path: str) -> list[Problem]:
    keys = config.gateway.api_keys
    if keys is None:
        return []
    if isinstance(keys, FileKeysConfig):
        return _file(keys.path, f"{path}.path", _trouble, allowed=_LINES, who="every gateway replica")
    if keys.variable not in environment:
        message = f"{keys.variable} is not set here; a gateway replica without it does not start"
        action = "set it where Ray is started"
        return [Problem(f"{path}.variable", message, _LINES, action, severity="warning")]
    trouble = _trouble(environment[keys.variable])
    return [Problem(f"{path}.variable", f"{keys.variable}: {trouble}", _LINES, "correct it")] if trouble else []


def _trouble(text: str) -> str | None:
    try:
        parse(text)
    except ValueError as exc:
        return str(exc)
    return None


def _file(file: str, path: str, trouble_of: Callable[[str], str | None], *, allowed: str, who: str) -> list[Problem]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as exc:
        message = f"cannot read {file!r} here ({exc.strerror}); {who} needs it, or does not start"
        return [Problem(path, message, allowed, "put it on every node", severity="warning")]
    except UnicodeDecodeError:
        return [Problem(path, f"{file!r} is not UTF-8 text", allowed, "correct it")]
    trouble = trouble_of(text)
    return [Problem(path, f"{file!r}: {trouble}", allowed, "correct it")] if trouble else []
