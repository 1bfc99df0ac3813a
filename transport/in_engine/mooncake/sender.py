# SPDX-License-Identifier: Apache-2.0
"""MooncakeConnector in a prefill engine's workers: KV held for decode engines, and an answer to each of them.

vLLM's prefill side answers only for KV that it sends. Here every transfer ends once, with an outcome. The worker tells
each decode engine that waits for an ended transfer, or asks for it later, so that this engine computes the prompt.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from cachetools import FIFOCache
from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import (
    MooncakeConnectorMetadata,
    MooncakeConnectorWorker,
    MooncakeXferResponse,
    MooncakeXferResponseStatus,
    SendBlockMeta,
)

from transport.in_engine.protocols import Ended, Outcome

logger = logging.getLogger(__name__)


_SENDER_TASKS = 1024
"""How many messages of decode engines may wait for their prompts at once. vLLM allows two for each sender thread. Then
a message whose KV is ready waits behind messages whose prompts are still to be computed."""
_REMEMBERED = 65_536
"""How many ended transfers are remembered for late decode engines; far more than can live at once within a lease."""


@dataclass
class _Hold:
    transfer_id: str
    expire_time: float
    """`time.perf_counter()` at which the lease ends."""
    outcome: Outcome | None = None
    """Set when our code has ended the hold, and not vLLM's."""


class Sending(MooncakeConnectorWorker):
    """The producer's half of the worker. Everything but `settle` and `take_ended` runs in the sender's event loop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_sender_tasks = _SENDER_TASKS
        self._holds: dict[str, _Hold] = {}
        self._gone: FIFOCache[str, str] = FIFOCache(_REMEMBERED)
        self._wanted_end: dict[str, str] = {}
        self._ended: Ended = {}

    def settle(self, req_ids: Collection[str]) -> None:
        """End the holds of these requests (vLLM's ids): they come out of the next `get_transfer_results`.

        Unknown ids are fine. A hold that is being written at this moment ends after the write.
        """
        if not self.is_kv_consumer and req_ids:
            asyncio.run_coroutine_threadsafe(self._settle(tuple(req_ids)), self.sender_loop)

    def take_ended(self) -> Ended:
        """Outcome and seconds of lease left, for each request reported as sent since the last call.

        `get_transfer_results` makes these reports.
        """
        ended, self._ended = self._ended, {}
        return ended

    async def _settle(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            if (hold := self._holds.get(req_id)) is not None:
                self._end(hold.transfer_id, "nobody will read it")

    async def record_send_reqs(self, metadata: MooncakeConnectorMetadata) -> None:
        """Register what the scheduler offers, and end what it has given up, in any order and however often."""
        for transfer_id in metadata.reqs_not_processed:
            self._end(transfer_id, "its prompt was aborted, or nobody will read it")
        offered = MooncakeConnectorMetadata()
        for req_id, (transfer_id, block_ids) in metadata.reqs_to_send.items():
            if block_ids:
                lease_s = envs.VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT
                hold = self._holds[req_id] = _Hold(transfer_id, time.perf_counter() + lease_s)
                known = self.reqs_need_send.get(transfer_id)
                if transfer_id in self._gone or (known is not None and known.ready.is_set()):
                    # The transfer was given up before it was ready, or a second request has its id.
                    hold.outcome = "released"
                    self.finished_sending_reqs.add(req_id)
                    continue
                if known is None:
                    self.reqs_need_send[transfer_id] = SendBlockMeta(req_id, transfer_id, [], asyncio.Event())
            elif transfer_id in self._gone:
                continue
            offered.reqs_to_send[req_id] = (transfer_id, block_ids)
        await super().record_send_reqs(offered)

    def _end(self, transfer_id: str, why: str) -> None:
        """End a transfer that nobody will read: its blocks go free, and decode engines waiting for it are told why."""
        entry = self.reqs_need_send.get(transfer_id)
        if entry is not None and entry.sending:
            self._wanted_end[transfer_id] = why
            return
        self._remember(transfer_id, why)
        if entry is None:
            return
        del self.reqs_need_send[transfer_id]
        if (hold := self._holds.get(entry.p_req_id)) is not None:
            hold.outcome = "released"
            self.finished_sending_reqs.add(entry.p_req_id)
        # This wakes vLLM's code that waits to send. It finds nothing to send; `_Answers` then tells the decode engine.
        entry.ready.set()

    def _remember(self, transfer_id: str, why: str) -> None:
        self._gone.setdefault(transfer_id, why)

    async def fetch_finished_sending_reqs(self) -> set[str]:
        """Request ids whose hold is over. From the same moment `take_ended` says how each ended."""
        read = set(self.finished_sending_reqs)
        finished: set[str] = await super().fetch_finished_sending_reqs()
        now = time.perf_counter()
        for req_id in finished:
            hold = self._holds.pop(req_id, None)
            if hold is None:
                continue
            outcome = hold.outcome or ("consumed" if req_id in read else "expired")
            if hold.transfer_id not in self.reqs_need_send:
                self._remember(hold.transfer_id, "its lease ended" if outcome == "expired" else f"it was {outcome}")
                self._wanted_end.pop(hold.transfer_id, None)
            self._ended[req_id] = (outcome, None if outcome == "expired" else max(0.0, hold.expire_time - now))
        return finished

    async def send_kv_to_decode(self, identity: bytes, sock: Any, meta: Any) -> None:
        """Answer one decode worker, for each of its requests: sent, or not, and why."""
        late = {d: self._gone[t] for d, (t, _) in meta.req_blocks.items() if t in self._gone}
        wanted = {d: asked for d, asked in meta.req_blocks.items() if d not in late}
        if late:
            answer = MooncakeXferResponse(
                status=MooncakeXferResponseStatus.CONTINUE if wanted else MooncakeXferResponseStatus.FINISH,
                err_reqs=list(late),
                err_msg="; ".join(sorted(set(late.values()))),
            )
            await sock.send_multipart((identity, self._encoder.encode(answer)))
            if not wanted:
                return
            meta = msgspec.structs.replace(meta, req_blocks=wanted)
        transfers = {d: t for d, (t, _) in wanted.items()}
        answers = _Answers(sock, self, transfers)
        try:
            await super().send_kv_to_decode(identity, answers, meta)
        except Exception:
            answers.refused.update(transfers.values())
            raise
        finally:
            for transfer_id in transfers.values():
                if transfer_id in answers.refused:
                    self._end(transfer_id, "its decode engine was told that it will not come")
                elif transfer_id not in self.reqs_need_send:
                    self._remember(transfer_id, "it was consumed")
                elif transfer_id in self._wanted_end:
                    self._end(transfer_id, self._wanted_end.pop(transfer_id))

    async def _build_transfer_params(self, ready_reqs: Any, *args: Any) -> Any:
        # If an error left this method, vLLM would leave the requests marked as being sent, and so hold them for ever.
        try:
            return await super()._build_transfer_params(ready_reqs, *args)
        except Exception as exc:
            logger.exception("the blocks of a hand-off could not be matched")
            return [], [], [], [d_req_id for d_req_id, _ in ready_reqs], repr(exc)

    def _send_blocks(self, *args: Any) -> int:
        try:
            return int(super()._send_blocks(*args))
        except Exception:
            logger.exception("Mooncake could not write")
            self.xfer_stats.record_failed_transfer()
            return -1


class _Answers:
    """Stands for the socket in `send_kv_to_decode`: adds to each answer the requests that vLLM leaves unanswered."""

    def __init__(self, sock: Any, worker: Sending, transfers: dict[str, str]) -> None:
        self._sock = sock
        self._worker = worker
        self._open = dict(transfers)
        self.refused: set[str] = set()

    async def send_multipart(self, parts: tuple[bytes, bytes]) -> None:
        identity, raw = parts
        answer = self._worker._xfer_resp_decoder.decode(raw)
        for d_req_id in answer.ok_reqs or ():
            self._open.pop(d_req_id, None)
        if answer.status == MooncakeXferResponseStatus.ERROR:
            self.refused.update(self._open.values())
            self._open.clear()
        else:
            failed = [d for d in answer.err_reqs or () if d in self._open]
            last = answer.status == MooncakeXferResponseStatus.FINISH
            dropped = [d for d, t in self._open.items() if d not in failed and (last or t in self._worker._gone)]
            if dropped:
                why = {self._worker._gone.get(self._open[d], "it is not held here") for d in dropped}
                answer.err_reqs = [*(answer.err_reqs or ()), *dropped]
                answer.err_msg = "; ".join(filter(None, [answer.err_msg, *sorted(why)]))
                raw = self._worker._encoder.encode(answer)
            self.refused.update(self._open.pop(d) for d in [*failed, *dropped])
        await self._sock.send_multipart((identity, raw))
