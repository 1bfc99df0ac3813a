# SPDX-License-Identifier: Apache-2.0
"""The notes in which the processes of an engine say why they fail."""

from __future__ import annotations

import logging
import logging.config
from collections.abc import Iterator
from pathlib import Path

import pytest

from transport.in_engine import root_cause


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    before = logging.getLogRecordFactory()
    root_cause.watch(str(tmp_path / "notes"))
    yield tmp_path / "notes"
    logging.setLogRecordFactory(before)


def fail(name: str, words: str, level: int = logging.ERROR) -> None:
    try:
        raise ValueError(words)
    except ValueError:
        logging.getLogger(name).log(level, "it failed", exc_info=True)


def test_errors_of_vllm_are_noted_in_order(notes: Path) -> None:
    """A line each; what others log, what has no exception and what is no error is not."""
    fail("vllm.v1.worker", "first\n  cause")
    fail("other.vllm", "not ours")
    fail("vllm", "a warning", logging.WARNING)
    logging.getLogger("vllm.v1").error("without an exception")
    fail("vllm", "second")
    assert notes.read_text() == "ValueError: first cause\nValueError: second\n"


def test_logging_that_is_configured_anew_keeps_them(notes: Path) -> None:
    """As vLLM does in every worker, and watching twice notes once."""
    root_cause.watch(str(notes))
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": {"vllm": {"level": "INFO"}}})
    fail("vllm.v1", "told")
    assert notes.read_text() == "ValueError: told\n"
