# SPDX-License-Identifier: Apache-2.0
"""Notes why a process of an engine fails, for the replica that owns the engine.

vLLM raises `Engine core initialization failed. See root cause above` in the replica's process. The root cause is in the
log of EngineCore or of a worker, where only a reader of the whole log finds it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

VARIABLE = "DISAGG_ROOT_CAUSE_FILE"
"""File in which the processes of one engine note their failures, a line each, the first one first."""
_MAX_CHARACTERS = 1000


class _Notes:
    """Makes log records, and notes the exceptions of vLLM's.

    In place of a handler, which a worker would lose: vLLM configures the logging of each process anew.
    """

    def __init__(self, path: str, make: Callable[..., logging.LogRecord]) -> None:
        self._path = path
        self._make = make

    def __call__(self, name: str, level: int, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(name, level, *args, **kwargs)
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and level >= logging.ERROR and name.partition(".")[0] == "vllm":
            self._note(error)
        return record

    def _note(self, error: BaseException) -> None:
        with contextlib.suppress(OSError):
            note = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(note, (in_one_line(error) + "\n").encode(errors="replace"))
            finally:
                os.close(note)


def watch(path: str) -> None:
    """Note every exception that vLLM logs in this process, and in those that are forked from it. Idempotent."""
    make = logging.getLogRecordFactory()
    if not isinstance(make, _Notes):
        logging.setLogRecordFactory(_Notes(path, make))


def in_one_line(error: BaseException) -> str:
    """Type and message, such as `ValueError: no such file`."""
    words = " ".join(str(error).split())[:_MAX_CHARACTERS]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
