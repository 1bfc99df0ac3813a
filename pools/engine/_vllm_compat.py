# SPDX-License-Identifier: Apache-2.0
"""Every vLLM name that is private or has moved between releases, in one place.

Importing this module checks the names against their entries in `pools.borrowed`. `vllm_engine.py` decides what is
done with them.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

from starlette.datastructures import State
from vllm import SamplingParams
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, IncrementalDetokenizer
from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from pools.borrowed import BORROWED
from pools.engine.vllm_arguments import split_args
from transport.handoff_params import settle_params
from transport.upstream.guard import require

__all__ = [
    "AsyncLLM",
    "StatLoggerBase",
    "VLLMValidationError",
    "VllmEngineDeadError",
    "incremental_detokenizer",
    "init_app_state",
    "settle_request",
    "split_args",
    "vllm_app",
]

require(BORROWED, "pools.engine")


def incremental_detokenizer(
    tokenizer: Any, prompt_token_ids: list[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
) -> BaseIncrementalDetokenizer:
    """The detokenizer that the engine uses: after the same prompt it turns the same tokens into the same text."""
    params = SamplingParams(
        skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces_between_special_tokens
    )
    request = EngineCoreRequest(
        request_id="texts",
        prompt_token_ids=prompt_token_ids,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    assert isinstance(detokenizer, BaseIncrementalDetokenizer)
    return detokenizer


async def vllm_app(engine: AsyncLLM, args: argparse.Namespace) -> Any:
    """vLLM's own OpenAI FastAPI app over a running engine.

    Source: vLLM 0.32 `entrypoints/launchers/api_server`. vLLM's error handler sets `state.server.should_exit`
    to end the launcher's uvicorn server. A replica watches for a dead engine itself, so a stand-in takes the flag.
    """
    tasks = await engine.get_supported_tasks()
    state = State()
    await init_app_state(engine, state, args, tasks)
    app = build_app(args, tasks, engine.model_config)
    app.state._state.update(state._state)
    app.state.server = SimpleNamespace(should_exit=False)
    return app


def settle_request(request_id: str, handoff_ids: list[str]) -> EngineCoreRequest:
    """A request that tells the connector which hand-offs to settle. The engine aborts it before it is scheduled.

    Source: vLLM 0.32 `AsyncLLM.notify_kv_transfer_request_rejected`, which sends the same for its own purpose.
    """
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=1, extra_args={"kv_transfer_params": settle_params(handoff_ids)}, watermarking=False
        ),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        abort_immediately=True,
    )
