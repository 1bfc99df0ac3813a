# SPDX-License-Identifier: Apache-2.0
"""A config file with another model in it, for `disagg serve CONFIG --model ID_OR_DIRECTORY`."""

from __future__ import annotations

from pathlib import Path

import yaml

from disagg.advice import serve_file
from pools.plan.checkpoint import local_directory


def written(config: Path, model: str, directory: Path) -> Path:
    """A copy of `config` in `directory` that serves `model`, under the name that `name_of` gives it.

    A file that cannot be read, or has no place for a model, is returned as it is: the check says what is wrong with it.

    Args:
        model: a Hugging Face id, or the directory of a checkpoint.
    """
    try:
        data, _ = serve_file.parse(config.read_text(encoding="utf-8"))
        args = data["applications"][0]["args"]
        given = args.setdefault("model", {})
        given.update(source=model, id=name_of(model))
    except (OSError, UnicodeDecodeError, TypeError, LookupError, AttributeError):
        return config
    copy = directory / config.name
    copy.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return copy


def name_of(model: str) -> str:
    """What clients send as `model`: the id, or the last part of a directory."""
    directory = local_directory(model, Path.cwd())
    return model if directory is None else directory.resolve().name
