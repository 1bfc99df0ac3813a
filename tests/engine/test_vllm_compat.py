# SPDX-License-Identifier: Apache-2.0
"""The vLLM names and habits that are used here and that vLLM does not promise: gone ones fail here, not at run time."""

from __future__ import annotations

import inspect
import subprocess
import sys


def test_private_names_are_there() -> None:
    """Everything that the engine adapter takes from vLLM exists with the parameters it passes."""
    from vllm.v1.engine.output_processor import OutputProcessor

    from pools.engine import _vllm_compat as compat

    for name in ("add_request", "generate", "abort", "notify_kv_transfer_request_rejected", "get_supported_tasks"):
        assert callable(getattr(compat.AsyncLLM, name))
    assert "stat_loggers" in inspect.signature(compat.AsyncLLM.from_engine_args).parameters
    assert "internal" in inspect.signature(compat.AsyncLLM.abort).parameters
    assert "external_req_ids" in inspect.getsource(OutputProcessor.__init__)
    assert list(inspect.signature(compat.init_app_state).parameters)[:4] == [
        "engine_client",
        "state",
        "args",
        "supported_tasks",
    ]


def test_request_ids_are_derived_as_expected() -> None:
    """vLLM prefixes the request id as `abort` assumes when it looks for a caller's requests."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    assert 'f"chatcmpl-{self._base_request_id(' in inspect.getsource(OpenAIServingChat)
    assert 'f"cmpl-{self._base_request_id(' in inspect.getsource(OpenAIServingCompletion)
    assert 'f"{request_id}-{i}"' in inspect.getsource(OpenAIServingCompletion)


def test_unknown_arguments_are_refused() -> None:
    """An argument that vLLM does not have raises TypeError before any process starts."""
    import pytest

    from pools.engine._vllm_compat import split_args

    with pytest.raises(TypeError, match="no_such_argument"):
        split_args({"model": "x", "no_such_argument": 1})


def test_host_platform_fixes_fit() -> None:
    """Each fix for machines without an accelerator finds the code it replaces, and applies twice without harm."""
    script = (
        "from transport.in_engine.plugin import register; register(); register()\n"
        "import transport.in_engine.host_platform as fixes\n"
        "fixes.unpin_worker(); fixes.stop_progress_thread(); fixes.keep_seeded_generators()\n"
        "from vllm.platforms.cpu import CpuPlatform\n"
        "assert CpuPlatform.discover_numa_topology() == []\n"
        "from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker\n"
        "assert base_worker.nixl_agent_config(num_threads=1).enable_pthread is False\n"
        "from vllm.distributed.device_communicators.shm_broadcast import SpinCondition\n"
        "assert SpinCondition.wait.__name__ == 'resting_wait'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
