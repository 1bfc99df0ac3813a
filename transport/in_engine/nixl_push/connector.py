# SPDX-License-Identifier: Apache-2.0
"""NixlPushConnector as the engines load it: vLLM's, mended, and with the hand-off protocol of our outer connector.

It has vLLM's class name and is loaded through `kv_connector_module_path`. A decode engine registers its blocks with the
prefill engine, and the prefill engine writes the finished prompt's KV into them. Either event may come first.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector as vllm_nixl

from transport.in_engine.nixl_push.scheduler import PushScheduler
from transport.in_engine.nixl_push.worker import PushWorker
from transport.in_engine.patches.borrowed import BORROWED
from transport.in_engine.protocols import Ended
from transport.upstream.guard import require

require(BORROWED, "transport.in_engine.nixl_push")


class NixlPushConnector(vllm_nixl.NixlPushConnector):
    """The object that vLLM makes in the scheduler and in each worker; it forwards to PushScheduler or PushWorker."""

    connector_scheduler: PushScheduler | None
    connector_worker: PushWorker | None

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        # This skips vLLM's own __init__: it would make vLLM's scheduler or worker class, and with the worker a second
        # NIXL agent.
        super(vllm_nixl.NixlPushConnector, self).__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = PushScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = PushWorker(vllm_config, self.engine_id, kv_cache_config)

    # Worker side, called by the outer connector.

    def settle(self, req_ids: set[str]) -> None:
        assert self.connector_worker is not None
        self.connector_worker.settle(req_ids)

    def take_ended(self) -> Ended:
        """Call it after `get_transfer_results` of the same step."""
        assert self.connector_worker is not None
        return self.connector_worker.take_ended()

    # Scheduler side, called by the outer connector.

    def settle_handoffs(self, handoff_ids: Collection[str]) -> None:
        """See `PushScheduler.settle`."""
        assert self.connector_scheduler is not None
        self.connector_scheduler.settle(handoff_ids)

    def take_unread(self) -> list[str]:
        """See `PushScheduler.take_unread`."""
        assert self.connector_scheduler is not None
        return self.connector_scheduler.take_unread()
