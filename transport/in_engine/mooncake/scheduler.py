# SPDX-License-Identifier: Apache-2.0
"""MooncakeConnector in the scheduler's process: which hand-offs are offered, asked for, and given up."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import MooncakeConnectorScheduler
from vllm.v1.request import RequestStatus

from transport.handoff_params import DO_REMOTE_DECODE, DO_REMOTE_PREFILL, handoff_id_of

logger = logging.getLogger(__name__)

_OF_A_CONSUMER = ("transfer_id", "remote_engine_id", "remote_bootstrap_addr")


class Scheduler(MooncakeConnectorScheduler):
    """vLLM's, with parameters checked on arrival, and with hand-offs that can be given up on both sides."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unread: list[str] = []

    def on_new_request(self, request: Any) -> None:
        """Drop parameters that this engine cannot act on; the engine then computes the prompt itself.

        vLLM asserts, and takes EngineCore down, when an engine gets the parameters of the other role. With parameters
        that lack a key a request would wait for its KV for ever.
        """
        params = request.kv_transfer_params
        if params:
            if params.get(DO_REMOTE_PREFILL) and (self.is_kv_producer or not _is_complete(params)):
                logger.warning("request %s: unusable Mooncake parameters are ignored", request.request_id)
                params[DO_REMOTE_PREFILL] = False
            if params.get(DO_REMOTE_DECODE) and self.is_kv_consumer:
                logger.warning("request %s: a decode engine hands no KV over", request.request_id)
                params[DO_REMOTE_DECODE] = False
        super().on_new_request(request)

    def request_finished(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """As vLLM's, but it reports an unread hand-off instead of reading it, and also offers a prompt that stopped.

        For an unread hand-off vLLM would ask the prefill engine for no blocks, only to make it free its own. To the
        prefill engine that looks like a hand-off that was used.
        """
        params = request.kv_transfer_params or {}
        if params.get(DO_REMOTE_PREFILL):
            params[DO_REMOTE_PREFILL] = False
            self._unread.append(handoff_id_of(params, params["transfer_id"]))
            return False, None
        if not params.get(DO_REMOTE_DECODE) or not params.get("transfer_id"):
            return self._finished(request, block_ids)
        status = request.status
        if status == RequestStatus.FINISHED_STOPPED:
            # The first token ended the answer. vLLM offers the KV only after the length limit, but it is just as good.
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        try:
            return self._finished(request, self._of_prompt(request, block_ids))
        finally:
            request.status = status

    def _finished(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        held, params = super().request_finished(request, block_ids)
        return held, params

    def _of_prompt(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[list[int], ...]:
        """The prompt's blocks alone. vLLM sends a request's last blocks, so a block of output would shift them all."""
        if len(block_ids) != 1 or self._is_hma_required or self._has_mamba:
            return block_ids
        num_blocks = -(-request.num_prompt_tokens // self.block_size)
        return (list(block_ids[0][:num_blocks]),)

    def settle(self, transfer_ids: Collection[str]) -> None:
        """Prefill engine: nobody will read these hand-offs.

        With the next metadata every rank frees those that it holds, tells decode engines that wait for one, and holds
        none whose prompt ends later. Unknown and ended ids are fine.
        """
        if not self.is_kv_consumer:
            self._reqs_not_processed.update(transfer_ids)

    def take_unread(self) -> list[str]:
        """Ids of hand-offs whose request ended here before it asked the prefill engine for KV, since the last call."""
        unread, self._unread = self._unread, []
        return unread


def _is_complete(params: dict[str, Any]) -> bool:
    if not all(isinstance(params.get(key), str) and params[key] for key in _OF_A_CONSUMER):
        return False
    return str(params["remote_bootstrap_addr"]).startswith(("http://", "https://"))
