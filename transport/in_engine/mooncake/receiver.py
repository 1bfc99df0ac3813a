# SPDX-License-Identifier: Apache-2.0
"""MooncakeConnector in a decode engine's workers: prefill engines write KV into its memory, or say that none comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import MooncakeConnectorWorker

from transport.in_engine.mooncake.peers import Peers

logger = logging.getLogger(__name__)


class _Asked(dict[str, Any]):
    """What one prefill worker was asked for: vLLM's `PullReqMeta` by request id, and which of them it has answered."""

    def __init__(self, pull_metas: dict[str, Any]) -> None:
        super().__init__(pull_metas)
        self.answered: set[str] = set()


class Receiving(MooncakeConnectorWorker):
    """The consumer's half of the worker. Runs in the receiver's event loop.

    A request that asks several prefill workers fails only when none of them can write into its blocks any more: the
    scheduler gives the blocks of a failed load to other requests at once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._peers = Peers()

    def receive_kv(self, remote_engine_id: str, pull_metas: dict[str, Any]) -> None:
        """Ask every prefill worker that holds a part of the KV. If one is unknown, the requests fail at once."""
        try:
            super().receive_kv(remote_engine_id, pull_metas)
        except Exception as exc:
            self._remote_agents.pop(remote_engine_id, None)
            self._handle_failed_recv(pull_metas, list(pull_metas), f"{remote_engine_id} cannot be asked: {exc!r}")

    async def receive_kv_from_single_worker(self, worker_addr: str, pull_metas: dict[str, Any]) -> None:
        """Ask one prefill worker and take its answers. When its process dies, the requests fail in about a second."""
        asked = _Asked(pull_metas)
        pull = asyncio.ensure_future(super().receive_kv_from_single_worker(worker_addr, asked))
        gone = asyncio.ensure_future(self._peers.gone(worker_addr))
        try:
            await asyncio.wait({pull, gone}, return_when=asyncio.FIRST_COMPLETED)
            reason = "the prefill engine ended its answer without it"
            if not pull.done():
                reason = f"the prefill engine at {worker_addr} is gone"
                for engine_id in {meta.remote_engine_id for meta in asked.values()}:
                    self._remote_agents.pop(engine_id, None)
        finally:
            for task in (pull, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._handle_failed_recv(asked, list(asked), reason)

    def process_pulling_result(self, response: Any, pull_metas: dict[str, Any]) -> None:
        assert isinstance(pull_metas, _Asked)
        for req_id in response.ok_reqs or ():
            self._answered(pull_metas, req_id, None)
        self._handle_failed_recv(pull_metas, response.err_reqs or (), response.err_msg or "unknown error")

    def _handle_failed_recv(self, pull_metas: dict[str, Any], req_ids: Collection[str], reason: str) -> None:
        if not isinstance(pull_metas, _Asked):
            # Nobody has been asked yet.
            super()._handle_failed_recv(pull_metas, req_ids, reason)
            return
        for req_id in req_ids:
            self._answered(pull_metas, req_id, reason)

    def _answered(self, asked: _Asked, req_id: str, failure: str | None) -> None:
        """Count one worker's answer for one request; the last one decides whether the KV is there."""
        meta = asked.get(req_id)
        if meta is None or req_id in asked.answered:
            return
        asked.answered.add(req_id)
        meta.pull_tasks_count -= 1
        if failure is not None:
            meta.failure = failure
        if meta.pull_tasks_count > 0:
            return
        failure = getattr(meta, "failure", None)
        if failure is not None:
            super()._handle_failed_recv(asked, [req_id], failure)
        elif any(meta.local_block_ids):
            self.finished_recving_reqs.add(meta.d_req_id)
