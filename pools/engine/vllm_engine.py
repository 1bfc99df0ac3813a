# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in this process: AsyncLLM, vLLM's own OpenAI app over it, and what that app cannot say.

Importing this module imports vLLM, so the environment of `pools.launch.engine_env` has to be set before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from pools.engine._vllm_compat import (
    AsyncLLM,
    StatLoggerBase,
    VllmConfig,
    VllmEngineDeadError,
    VLLMValidationError,
    settle_request,
    split_args,
    vllm_app,
)
from pools.engine.base import Aborted, ASGIApp, EngineStats, KVTransferParams, ProbeResult
from pools.engine.events import EventLog
from pools.errors import EngineDeadError, EngineStartError, HandoffRefusedError

logger = logging.getLogger(__name__)

_LATE_OUTPUT_S = 0.5
"""How long an aborted request's last output may be on its way from EngineCore."""
_REMEMBERED_HANDOFFS = 65_536
"""Hand-off ids kept so that none is admitted twice; far beyond what a lease lets live at once."""
_SOURCES = {
    "p2p": "prompt_tokens_p2p",
    "host": "prompt_tokens_host",
    "disk": "prompt_tokens_disk",
    "external_unspecified": "prompt_tokens_external",
}
"""vLLM's `CacheHitSource` -> counter."""
_NIXL_COUNTS = {
    "nixl_num_failed_transfers": ("num_failed_transfers", "num_failed_handshakes"),
    "nixl_num_failed_notifications": ("num_failed_notifications",),
    "num_kv_expired_reqs": ("num_kv_expired_reqs",),
    "num_notifications_after_expiry": ("num_notifications_after_expiry",),
}
"""Counter -> lists in vLLM's statistics of NIXL with an entry for each case."""
_TOTALS = (
    *("prompt_tokens", "prompt_tokens_computed", "generation_tokens", "num_preemptions", "nixl_bytes_transferred"),
    *("kv_offload_load_bytes", "kv_offload_store_bytes"),
    *_SOURCES.values(),
    *_NIXL_COUNTS,
)


class VllmEngine:
    """`pools.engine.base.Engine` over one AsyncLLM. Used from one event loop."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = dict(arguments)
        self._events = EventLog()
        self._tally = _Tally(self._events)
        self._handoffs = _Handoffs()
        self._llm: AsyncLLM | None = None
        self._app: ASGIApp | None = None
        self._stopped = False
        self._cleanups: set[asyncio.Task[None]] = set()
        self._late_params: dict[str, asyncio.Future[KVTransferParams]] = {}

    @property
    def engine_id(self) -> str:
        config = self._arguments.get("kv_transfer_config")
        return str(config["engine_id"]) if config else ""

    @property
    def block_size(self) -> int:
        return int(self._running().vllm_config.cache_config.block_size)

    @property
    def vocab_size(self) -> int:
        return int(self._running().model_config.get_vocab_size())

    @property
    def app(self) -> ASGIApp:
        assert self._app is not None, "start() has not returned"
        return self._app

    @property
    def events(self) -> EventLog:
        return self._events

    @property
    def dead(self) -> BaseException | None:
        if self._llm is None:
            return EngineDeadError("the engine is not running")
        if self._llm.errored:
            return EngineDeadError("EngineCore is gone; its own log says why")
        return None

    async def start(self) -> None:
        try:
            engine_args, namespace = split_args(self._arguments)
            self._llm = AsyncLLM.from_engine_args(engine_args, stat_loggers=[self._tally.logger])
            self._guard_admissions(self._llm)
            self._watch_late_outputs(self._llm)
            self._app = await vllm_app(self._llm, namespace)
        except Exception as exc:
            await self.shutdown()
            raise EngineStartError(f"vLLM did not start: {exc}") from exc

    def _guard_admissions(self, llm: AsyncLLM) -> None:
        """See hand-off parameters on their way into the engine, by whatever route."""
        add_request = llm.add_request

        async def admitting(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            extra = getattr(params, "extra_args", None) or {}
            handoff = _handoff_id(extra.get("kv_transfer_params"))
            if handoff is None:
                return await add_request(request_id, prompt, params, *args, **kwargs)
            try:
                self._handoffs.admit(handoff)
            except HandoffRefusedError as exc:
                # A class that vLLM's routes answer with 400.
                raise VLLMValidationError(str(exc), parameter="kv_transfer_params") from exc
            adding = asyncio.ensure_future(add_request(request_id, prompt, params, *args, **kwargs))
            try:
                return await asyncio.shield(adding)
            except asyncio.CancelledError:
                # vLLM aborts only what it has a queue for. Cut off in between, the request would never be aborted and
                # its KV never fetched, so let it reach the engine and abort it there.
                self._keep(self._abort_added(llm, adding, extra["kv_transfer_params"]))
                raise
            except Exception:
                self._handoffs.forget(handoff)
                raise

        async def rejected(request_id: str, kv_transfer_params: dict[str, Any], **kwargs: Any) -> None:
            """A request that vLLM's server refused. vLLM would have the engine notify the producer as a reader does;
            the gateway sees the refusal and settles there, and these parameters are of no use here any more."""
            handoff = _handoff_id(kv_transfer_params)
            if handoff is not None:
                self._handoffs.refuse(handoff)

        llm.add_request = admitting
        llm.notify_kv_transfer_request_rejected = rejected

    async def _abort_added(self, llm: AsyncLLM, adding: asyncio.Future[Any], params: KVTransferParams) -> None:
        try:
            queue = await adding
        except Exception:
            logger.info("a hand-off was refused after its caller had left", exc_info=True)
            handoff = str(_handoff_id(params))
            self._handoffs.forget(handoff)
            self._handoffs.refuse(handoff)
            self._events.append({"kind": "unread", "at": time.time(), "id": _id_at_producer(params)})
        else:
            await llm.abort(queue.request_id, internal=True)

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a clean-up that outlives its request."""
        task = asyncio.create_task(coroutine)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    async def abort(self, request_id: str) -> Aborted:
        llm = self._running()
        running = [
            internal
            for external, internals in list(llm.output_processor.external_req_ids.items())
            if _is_of(external, request_id)
            for internal in internals
        ]
        if not running:
            return Aborted(found=False)
        late = {internal: asyncio.get_running_loop().create_future() for internal in running}
        self._late_params.update(late)
        try:
            await llm.abort(running, internal=True)
            done, _ = await asyncio.wait(late.values(), timeout=_LATE_OUTPUT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for internal in late:
                self._late_params.pop(internal, None)
        return Aborted(found=True, kv_transfer_params=done.pop().result() if done else None)

    def _watch_late_outputs(self, llm: AsyncLLM) -> None:
        """See hand-off parameters of requests that EngineCore had finished before it heard of their abort.

        vLLM drops such outputs, and the KV they offer would stay pinned until its lease ends.
        """
        process_outputs = llm.output_processor.process_outputs

        def watching(engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            if self._late_params:
                for output in engine_core_outputs:
                    late = self._late_params.get(output.request_id)
                    if late is not None and output.kv_transfer_params and not late.done():
                        late.set_result(output.kv_transfer_params)
            return process_outputs(engine_core_outputs, *args, **kwargs)

        llm.output_processor.process_outputs = watching

    async def settle(self, handoff_ids: Sequence[str]) -> None:
        if not handoff_ids:
            return
        # A request that ends before it is scheduled is the one message that reaches a connector's scheduler side.
        request = settle_request(f"settle-{uuid.uuid4().hex}", list(handoff_ids))
        try:
            await self._running().engine_core.add_request_async(request)
        except VllmEngineDeadError as exc:
            raise EngineDeadError("EngineCore is gone, and with it all KV it held") from exc

    async def reset_prefix_cache(self) -> bool:
        try:
            return bool(await self._running().reset_prefix_cache())
        except VllmEngineDeadError as exc:
            raise EngineDeadError("EngineCore is gone") from exc

    async def probe(
        self, prompt_token_ids: Sequence[int], kv_transfer_params: KVTransferParams | None = None
    ) -> ProbeResult:
        if kv_transfer_params:
            # With this key vLLM reports what the prefill engine had cached, not what arrived here.
            kv_transfer_params = {k: v for k, v in kv_transfer_params.items() if k != "remote_prefill_cached_tokens"}
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": kv_transfer_params} if kv_transfer_params else None,
        )
        prompt = TokensPrompt(prompt_token_ids=list(prompt_token_ids))
        output: Any = None
        try:
            async for latest in self._running().generate(prompt, params, f"probe-{uuid.uuid4().hex}"):
                output = latest
        except VllmEngineDeadError as exc:
            raise EngineDeadError("EngineCore died during a probe") from exc
        except VLLMValidationError as exc:
            if isinstance(exc.__cause__, HandoffRefusedError):
                raise exc.__cause__ from None
            raise
        assert output is not None, "generate() ended without an output"
        return ProbeResult(
            num_cached_tokens=output.num_cached_tokens or 0,
            kv_transfer_params=output.kv_transfer_params,
            finish_reason=output.outputs[0].finish_reason,
        )

    def stats(self) -> EngineStats:
        return self._tally.snapshot(self._handoffs)

    async def shutdown(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        llm, self._llm = self._llm, None
        if llm is not None:
            # Joins the engine's processes, for seconds.
            with contextlib.suppress(VllmEngineDeadError):
                await asyncio.to_thread(llm.shutdown)

    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDeadError("the engine is not running")
        return self._llm


def _handoff_id(params: Any) -> str | None:
    """Identity of a hand-off at its consumer, or None for parameters that consume nothing."""
    if not isinstance(params, dict) or not params.get("do_remote_prefill"):
        return None
    # Mooncake names a hand-off by `transfer_id` alone.
    return f"{params.get('remote_engine_id')}/{params.get('remote_request_id') or params.get('transfer_id')}"


def _id_at_producer(params: KVTransferParams) -> str:
    """The id under which the prefill engine tracks this hand-off."""
    return str(params.get("disagg.handoff_id") or params.get("remote_request_id") or params.get("transfer_id"))


def _is_of(external_id: str, request_id: str) -> bool:
    """True when vLLM derived `external_id` from the `X-Request-Id` header `request_id`.

    Source: vLLM 0.32 `chatcmpl-<id>` and `cmpl-<id>-<prompt index>`.
    """
    if external_id == f"chatcmpl-{request_id}":
        return True
    head, _, index = external_id.rpartition("-")
    return head == f"cmpl-{request_id}" and index.isdigit()


class _Handoffs:
    """Which hand-offs were admitted or refused, so that parameters are used once."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, bool] = OrderedDict()
        self.num_admitted = 0

    def admit(self, handoff: str) -> None:
        if handoff in self._seen:
            verb = "admitted" if self._seen[handoff] else "refused"
            raise HandoffRefusedError(f"hand-off {handoff} was {verb} before; parameters are single-use")
        self._remember(handoff, admitted=True)
        self.num_admitted += 1

    def forget(self, handoff: str) -> None:
        """Take an admission back: the engine refused the request."""
        if self._seen.pop(handoff, False):
            self.num_admitted -= 1

    def refuse(self, handoff: str) -> None:
        if handoff not in self._seen:
            self._remember(handoff, admitted=False)

    def _remember(self, handoff: str, *, admitted: bool) -> None:
        self._seen[handoff] = admitted
        if len(self._seen) > _REMEMBERED_HANDOFFS:
            self._seen.popitem(last=False)


class _Tally:
    """Counts what vLLM reports after each engine step, and passes on the events that come with it."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self.running = 0
        self.waiting = 0
        self.kv_cache_usage = 0.0
        self.totals: Counter[str] = Counter()

    def logger(self, vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        return _TallyLogger(self)

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        totals = self.totals
        if iteration_stats is not None:
            totals["prompt_tokens"] += iteration_stats.prompt_token_stats.total
            totals["prompt_tokens_computed"] += iteration_stats.prompt_token_stats.computed
            totals["generation_tokens"] += iteration_stats.num_generation_tokens
            totals["num_preemptions"] += iteration_stats.num_preempted_reqs
        if scheduler_stats is None:
            return
        self.running = scheduler_stats.num_running_reqs
        self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        self.kv_cache_usage = scheduler_stats.kv_cache_usage
        if (loads := scheduler_stats.connector_prefix_cache_stats) is not None:
            for source, tokens in loads.hits_by_source.items():
                if source in _SOURCES:
                    totals[_SOURCES[source]] += tokens
        children = scheduler_stats.kv_connector_stats or {}
        nixl = children.get("NixlConnector") or {}
        totals["nixl_bytes_transferred"] += sum(nixl.get("bytes_transferred", ()))
        for name, keys in _NIXL_COUNTS.items():
            totals[name] += sum(len(nixl.get(key, ())) for key in keys)
        offload = (children.get("OffloadingConnector") or {}).get("data", {})
        for name in ("kv_offload_load_bytes", "kv_offload_store_bytes"):
            totals[name] += int(sum(offload.get(f"vllm:{name}", {}).values()))
        for event in (children.get("Handoffs") or {}).get("events", ()):
            self._events.append(event)

    def snapshot(self, handoffs: _Handoffs) -> EngineStats:
        return EngineStats(
            num_requests_running=self.running,
            num_requests_waiting=self.waiting,
            kv_cache_usage=self.kv_cache_usage,
            num_handoffs_admitted_total=handoffs.num_admitted,
            **{f"{name}_total": self.totals[name] for name in _TOTALS},
        )


class _TallyLogger(StatLoggerBase):
    def __init__(self, tally: _Tally) -> None:
        self._tally = tally

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        self._tally.record(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        pass
