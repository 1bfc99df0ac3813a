# SPDX-License-Identifier: Apache-2.0
"""Processes of a test that find vLLM imported: forked from a server that has done it once, and has no threads."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

MODULES = ["torch.distributed", "vllm.v1.worker.gpu_model_runner"]
"""None of them imports NIXL, whose UCX reads the environment of the process that imports it."""


def context() -> ForkServerContext:
    """For `Process`, as with "spawn". A child has the environment of the first process that was made here."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(MODULES)
    return found
