# SPDX-License-Identifier: Apache-2.0
"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in each process that it starts for an engine.

A forked worker is none of these processes: it inherits what EngineCore has applied. vLLM calls `register` for other
people's engines of the environment, too. So `register` looks for the variable that a replica sets for its own engine.
Without this variable, or on a platform on which nothing is replaced, it loads no other package and changes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import cast, get_args

from transport.in_engine import root_cause
from transport.in_engine.patches.forking import fork_workers, forks_workers
from transport.in_engine.patches.replaced import REPLACED
from transport.upstream.names import Platform
from transport.upstream.replacing import apply, chosen

PLATFORM_VARIABLE = "DISAGG_ENGINE_PLATFORM"
"""Says that this process belongs to an engine of ours, and on which platform. Set by `pools.plan.launch`."""


def register() -> None:
    """Apply what every process of an engine needs. Idempotent, as vLLM asks of a plugin."""
    if (notes := os.environ.get(root_cause.VARIABLE)) is not None:
        root_cause.watch(notes)
    platform = os.environ.get(PLATFORM_VARIABLE)
    if platform not in get_args(Platform) or not chosen(REPLACED, "engine_core", cast(Platform, platform)):
        return
    from transport.in_engine.patches.borrowed import BORROWED
    from transport.upstream.guard import require

    require(BORROWED, "transport.in_engine.patches.spinning")
    require(BORROWED, "transport.in_engine.patches.nameless")
    apply(REPLACED, "engine_core", cast(Platform, platform))
    if forks_workers(os.environ, is_child=multiprocessing.parent_process() is not None):
        require(BORROWED, "transport.in_engine.patches.forking")
        fork_workers(os.environ)
