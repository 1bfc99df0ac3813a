# SPDX-License-Identifier: Apache-2.0
"""What vLLM's classes say of a config of which a replica did not start.

A start that goes well does not wait for it: it takes seconds of a core, and an engine refuses the same values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from disagg.advice.check import CheckReport, check_file
from disagg.advice.values import ask_vllm


class SecondOpinion:
    """Checks a config file once more, with the judge of values, in a thread of its own."""

    def __init__(self, config: str | Path, check: Callable[..., CheckReport] = check_file) -> None:
        self._config, self._check = config, check
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None
        self._found: str | None = None

    def ask(self) -> None:
        """Begin, at the first call."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._judge, name="second-opinion", daemon=True)
            self._thread.start()

    def found(self) -> str | None:
        """The first value that cannot work, with its path; None while there is none."""
        return self._found

    def end(self) -> None:
        """Give up, and wait until the process that was asked has ended."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()

    def _judge(self) -> None:
        # The application listens at its ports already.
        report = self._check(self._config, update=True, ask=partial(ask_vllm, given_up=self._given_up.is_set))
        errors = [one for one in report.problems if one.severity == "error"]
        # Of the machine it would speak as if nothing ran here yet.
        if (wrong := next((one for one in errors if ".engine_kwargs" in one.path), None)) is not None:
            self._found = f"{wrong.path}: {wrong.message}"
