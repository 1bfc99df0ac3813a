# SPDX-License-Identifier: Apache-2.0
"""The vLLM names and habits that are used here and that vLLM does not promise: gone ones fail here, not at run time."""

from __future__ import annotations

import inspect
import traceback
from multiprocessing.connection import Connection

from tests.support import preloaded


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


def test_what_the_connectors_override_is_there() -> None:
    """The parts of vLLM's MultiConnector, NIXL connector and scheduler that ours rely on look as they did."""
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker, pull_scheduler, pull_worker
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore

    for method in ("_aggregate_request_finished", "_get_connector_classes_and_configs", "build_connector_worker_meta"):
        assert callable(getattr(MultiConnector, method))
    assert "_requests_to_connector" in inspect.getsource(MultiConnector)
    worker = inspect.getsource(base_worker.NixlBaseConnectorWorker)
    for part in (
        "self._reqs_to_send: dict[ReqId, float]",
        "self._reqs_to_process: set[ReqId]",
        "done_sending = self._get_new_notifs()",
        "self._reap_expired_send_leases(done_sending)",
        "consumer_notification_counts_by_req",
        "expected_consumer_notifications_by_req",
    ):
        assert part in worker
    assert "notified_req_ids.add(req_id)" in inspect.getsource(pull_worker.NixlPullConnectorWorker._get_new_notifs)
    assert "self._reqs_need_recv[request.request_id]" in inspect.getsource(pull_scheduler.NixlPullConnectorScheduler)
    assert "abort_immediately" in EngineCoreRequest.__struct_fields__
    assert "if request.abort_immediately:" in inspect.getsource(EngineCore.add_request)
    # The connector is told before the blocks are freed, and asked for statistics after it was told.
    told = inspect.getsource(Scheduler._update_from_kv_xfer_finished)
    assert told.index("update_connector_output(") < told.index("_free_blocks(")
    step = inspect.getsource(Scheduler.update_from_output)
    assert step.index("_update_from_kv_xfer_finished(") < step.index("self.connector.get_kv_connector_stats()")
    # The set from which `build_connector_meta` takes settle requests is the one that goes to the workers.
    assert "finished_req_ids=self.finished_req_ids," in inspect.getsource(Scheduler.schedule)


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


def _runs(script: str) -> None:
    """In a process of its own: what it patches stays there."""
    context = preloaded.context()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(script, writer), daemon=True)
    process.start()
    assert reader.poll(300), "the script does not end"
    problem = reader.recv()
    process.join(30)
    assert problem is None, problem


def _run(script: str, writer: Connection) -> None:
    try:
        exec(script, {})
        writer.send(None)
    except BaseException:
        writer.send(traceback.format_exc()[-2000:])


def test_host_platform_fixes_fit() -> None:
    """Each fix for machines without an accelerator finds the code it replaces, and applies twice without harm."""
    script = (
        "import os; os.environ['DISAGG_ENGINE_PLATFORM'] = 'cpu'\n"
        "from transport.in_engine.plugin import register; register(); register()\n"
        "import importlib, transport.in_engine.patches.worker as worker; importlib.reload(worker)\n"
        "from vllm.platforms.cpu import CpuPlatform\n"
        "assert CpuPlatform.discover_numa_topology() == []\n"
        "from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker\n"
        "assert base_worker.nixl_agent_config(num_threads=1).enable_pthread is False\n"
        "from vllm.distributed.device_communicators.shm_broadcast import SpinCondition\n"
        "from transport.upstream.loaded import is_ours\n"
        "assert is_ours(SpinCondition.wait) and not is_ours(SpinCondition.wait.__wrapped__)\n"
    )
    _runs(script)


def test_an_idle_reader_of_a_queue_rests() -> None:
    """In the half second after a message it looks a few dozen times; without a notification it looks all the same."""
    script = (
        "import time, zmq\n"
        "import os; os.environ['DISAGG_ENGINE_PLATFORM'] = 'cpu'\n"
        "from transport.in_engine.plugin import register; register()\n"
        "from vllm.distributed.device_communicators.shm_broadcast import SpinCondition\n"
        "from vllm.utils.network_utils import get_open_zmq_ipc_path\n"
        "context, address = zmq.Context(), get_open_zmq_ipc_path()\n"
        "writer = SpinCondition(False, context, address); reader = SpinCondition(True, context, address)\n"
        "time.sleep(0.2)  # until the reader's subscription has arrived\n"
        "looks, began = 0, time.monotonic(); reader.record_read()\n"
        "while time.monotonic() < began + 0.5:\n"
        "    reader.wait(None); looks += 1\n"
        "assert 5 <= looks < 150, looks\n"
        "reader.last_read = time.monotonic() - 10; writer.notify(); reader.wait(None)\n"
        "reader.last_read = time.monotonic() - 10; began = time.monotonic(); reader.wait(300)\n"
        "assert time.monotonic() - began > 0.2, 'a reader that is idle for long does not wait for a notification'\n"
    )
    _runs(script)
