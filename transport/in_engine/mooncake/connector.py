# SPDX-License-Identifier: Apache-2.0
"""MooncakeConnector as the engines load it: vLLM's, mended, and with the hand-off protocol of our outer connector.

It has vLLM's class name, which vLLM uses as a key of statistics. The scheduler side is in `scheduler`. The worker's two
halves are in `sender` and `receiver`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake import mooncake_connector as vllm_mooncake

from transport.in_engine.mooncake.door import BootstrapServer, DoorContext
from transport.in_engine.mooncake.metrics import MooncakePromMetrics
from transport.in_engine.mooncake.receiver import Receiving
from transport.in_engine.mooncake.scheduler import Scheduler
from transport.in_engine.mooncake.sender import Sending
from transport.in_engine.patches.borrowed import BORROWED
from transport.in_engine.patches.replaced import DEVICE_INDEX
from transport.in_engine.protocols import Ended
from transport.upstream.guard import require
from transport.upstream.replacing import during

require(BORROWED, "transport.in_engine.mooncake")


class Worker(Sending, Receiving):
    """Both halves of the worker. An engine uses the half of its role."""

    async_zmq_ctx: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _device_index():
            super().__init__(*args, **kwargs)
        # vLLM has opened no socket in its own context yet: it opens the side channel in `register_kv_caches`.
        self.async_zmq_ctx.term()
        self.async_zmq_ctx = DoorContext()
        self._bootstrap_server: BootstrapServer | None = None
        if not self.is_kv_consumer and self.tp_rank == 0 and self.pp_rank == 0:
            host, port = vllm_mooncake.get_mooncake_bootstrap_addr(self.vllm_config)
            self._bootstrap_server = BootstrapServer(
                host, port, engine_id=self.engine_id, tp_size=self.tp_size, pp_size=self.pp_size
            )
            self._bootstrap_server.start()

    def shutdown(self) -> None:
        """As vLLM's, which does not know our bootstrap server."""
        super().shutdown()
        if (server := getattr(self, "_bootstrap_server", None)) is not None:
            server.shutdown()


class MooncakeConnector(vllm_mooncake.MooncakeConnector):
    """vLLM's MooncakeConnector around our scheduler and worker halves.

    Source:
        vLLM 0.32 `MooncakeConnector.__init__`, which names its classes and offers no other way to choose them.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super(vllm_mooncake.MooncakeConnector, self).__init__(vllm_config, role, kv_cache_config)
        self.engine_id = vllm_config.kv_transfer_config.engine_id
        self.connector_scheduler: Scheduler | None = None
        self.connector_worker: Worker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = Scheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = Worker(vllm_config, self.engine_id, kv_cache_config)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> MooncakePromMetrics:
        return MooncakePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Worker side, called by the outer connector.

    def settle(self, req_ids: Collection[str]) -> None:
        """See `Sending.settle`."""
        assert self.connector_worker is not None
        self.connector_worker.settle(req_ids)

    def take_ended(self) -> Ended:
        """See `Sending.take_ended`. Call it after `get_transfer_results` of the same step."""
        assert self.connector_worker is not None
        return self.connector_worker.take_ended()

    # Scheduler side, called by the outer connector.

    def settle_handoffs(self, handoff_ids: list[str]) -> None:
        """Prefill: like `settle`, by hand-off id (= `transfer_id`), on every rank and for ids not produced yet too."""
        assert self.connector_scheduler is not None
        self.connector_scheduler.settle(handoff_ids)

    def take_unread(self) -> list[str]:
        """See `Scheduler.take_unread`."""
        assert self.connector_scheduler is not None
        return self.connector_scheduler.take_unread()


@contextlib.contextmanager
def _device_index() -> Iterator[None]:
    """Give vLLM's worker a device index where there is no accelerator; torch raises when asked for one there."""
    if torch.accelerator.is_available():
        yield
        return
    with during(DEVICE_INDEX, lambda original: lambda: 0):
        yield
