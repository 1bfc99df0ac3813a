# SPDX-License-Identifier: Apache-2.0
"""The names read from vLLM's source are those of its classes."""

from __future__ import annotations

import dataclasses

from pools.config import RESERVED_ENGINE_KWARGS, SHARED_ENGINE_KWARGS
from pools.plan.engine_kwargs import known_engine_kwargs

CLI_ONLY = {"model_tag", "headless", "api_server_count"}


def test_names_match_the_classes() -> None:
    """Reading the source gives the fields of AsyncEngineArgs and FrontendArgs."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    fields = {field.name for cls in (AsyncEngineArgs, FrontendArgs) for field in dataclasses.fields(cls)}
    assert known_engine_kwargs() == {name for name in fields if not name.startswith("_")}


def test_own_tables_name_real_arguments() -> None:
    """Arguments that are refused or must be shared exist in vLLM."""
    known = known_engine_kwargs()
    assert known is not None
    assert RESERVED_ENGINE_KWARGS.keys() - CLI_ONLY <= known
    assert known >= SHARED_ENGINE_KWARGS
