# SPDX-License-Identifier: Apache-2.0
"""Serve's log of a replica goes on after vLLM has configured logging."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
from pathlib import Path

from pools.process.log_targets import kept_log_targets


def test_a_handler_keeps_its_target(tmp_path: Path) -> None:
    """What is logged afterwards reaches the file, and the target is known."""
    file = logging.FileHandler(tmp_path / "log")
    handler = logging.handlers.MemoryHandler(capacity=1, target=file)
    logger = logging.getLogger("test.log.targets")
    logger.addHandler(handler)
    try:
        with kept_log_targets(logger.name):
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
            assert handler.target is None
        assert handler.target is file
        logger.warning("still here")
        handler.flush()
        assert "still here" in (tmp_path / "log").read_text()
    finally:
        logger.removeHandler(handler)
        handler.close()
        file.close()
