# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in this process: AsyncLLM, vLLM's own OpenAI app over it, and what that app cannot say.

Importing this module imports vLLM, so the environment of `pools.plan.launch.engine_env` has to be set before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from pools.engine import vllm_media
from pools.engine._vllm_compat import (
    AsyncLLM,
    StatLoggerBase,
    VllmEngineDeadError,
    VLLMValidationError,
    settle_request,
    split_args,
    vllm_app,
)
from pools.engine.base import ASGIApp, EngineStats, KVTransferParams, ProbeResult
from pools.engine.events import EventLog
from pools.engine.handoffs import Admissions, ConsumedHandoff, consumed_by
from pools.engine.vllm_cached_tokens import CachedTokens
from pools.engine.vllm_tally import Tally
from pools.errors import EngineDeadError, EngineStartError, HandoffRefusedError

logger = logging.getLogger(__name__)


class VllmEngine:
    """`pools.engine.base.Engine` over one AsyncLLM. Used from one event loop."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = dict(arguments)
        self._events = EventLog()
        self._tally = Tally(self._events)
        self._handoffs = Admissions(self._events)
        self._llm: AsyncLLM | None = None
        self._cached: CachedTokens | None = None
        self._app: ASGIApp | None = None
        self._stopped = False
        self._cleanups: set[asyncio.Task[None]] = set()

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
            vllm_media.install()
            engine_args, namespace = split_args(self._arguments)
            self._llm = AsyncLLM.from_engine_args(engine_args, stat_loggers=[self._stat_logger])
            vllm_media.guard_tokenizers(self._arguments.get("allowed_media_domains"))
            self._cached = CachedTokens(self._llm.output_processor)
            self._guard_admissions(self._llm)
            self._app = self._handoffs.watch(await vllm_app(self._llm, namespace))
        except Exception as exc:
            await self.shutdown()
            raise EngineStartError(f"vLLM did not start: {exc}") from exc

    def _stat_logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        return _TallyLogger(self._tally)

    def _guard_admissions(self, llm: AsyncLLM) -> None:
        """Wrap the methods of `llm` through which hand-off parameters reach the engine, by whatever route they come."""
        add_request = llm.add_request

        async def admitting(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            extra = getattr(params, "extra_args", None) or {}
            handoff = consumed_by(extra.get("kv_transfer_params"))
            if handoff is None:
                return await add_request(request_id, prompt, params, *args, **kwargs)
            try:
                self._handoffs.admit(handoff)
            except HandoffRefusedError as exc:
                # vLLM's routes answer an error of this class with 400.
                raise VLLMValidationError(str(exc), parameter="kv_transfer_params") from exc
            adding = asyncio.ensure_future(add_request(request_id, prompt, params, *args, **kwargs))
            try:
                return await asyncio.shield(adding)
            except asyncio.CancelledError:
                # vLLM aborts only requests that it has a queue for. A request that is cancelled before that would never
                # be aborted, and its KV never fetched. So let the request reach the engine, and abort it there.
                self._keep(self._abort_added(llm, adding, handoff))
                raise
            except Exception:
                self._handoffs.forget(handoff)
                raise

        async def rejected(request_id: str, kv_transfer_params: dict[str, Any], **kwargs: Any) -> None:
            """vLLM calls this for a request that its server refused.

            vLLM's own method would make the engine notify the prefill engine as a reader does. Here the gateway
            settles the hand-off when it sees the refusal, and this engine never admits these parameters.
            """
            handoff = consumed_by(kv_transfer_params)
            if handoff is not None:
                self._handoffs.refuse(handoff)

        llm.add_request = admitting
        llm.notify_kv_transfer_request_rejected = rejected

    async def _abort_added(self, llm: AsyncLLM, adding: asyncio.Future[Any], handoff: ConsumedHandoff) -> None:
        try:
            queue = await adding
        except Exception:
            logger.info("a hand-off was refused after its caller had left", exc_info=True)
            self._handoffs.forget(handoff)
            self._handoffs.refuse(handoff)
            self._handoffs.give_up(handoff.id)
        else:
            await llm.abort(queue.request_id, internal=True)

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a clean-up that outlives its request."""
        task = asyncio.create_task(coroutine)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    async def abort(self, request_id: str) -> bool:
        llm = self._running()
        running = [
            internal
            for external, internals in list(llm.output_processor.external_req_ids.items())
            if _is_of(external, request_id)
            for internal in internals
        ]
        if running:
            await llm.abort(running, internal=True)
        return bool(running)

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
        self,
        prompt_token_ids: Sequence[int],
        kv_transfer_params: KVTransferParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        session_id: str | None = None,
    ) -> ProbeResult:
        assert self._cached is not None, "start() has not returned"
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": kv_transfer_params} if kv_transfer_params else None,
        )
        prompt = TokensPrompt(prompt_token_ids=list(prompt_token_ids))
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        output: Any = None
        request_id = f"probe-{uuid.uuid4().hex}"
        self._cached.expect(request_id)
        try:
            async for latest in self._running().generate(
                prompt, params, request_id, priority=priority, session_id=session_id
            ):
                output = latest
        except VllmEngineDeadError as exc:
            raise EngineDeadError("EngineCore died during a probe") from exc
        except VLLMValidationError as exc:
            if isinstance(exc.__cause__, HandoffRefusedError):
                raise exc.__cause__ from None
            raise
        finally:
            num_cached_before = self._cached.had(request_id)
        assert output is not None, "generate() ended without an output"
        return ProbeResult(
            num_cached_tokens=output.num_cached_tokens or 0,
            kv_transfer_params=output.kv_transfer_params,
            finish_reason=output.outputs[0].finish_reason,
            num_cached_before=num_cached_before,
        )

    def stats(self) -> EngineStats:
        return self._tally.snapshot(self._handoffs.num_admitted)

    async def shutdown(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        llm, self._llm = self._llm, None
        if llm is not None:
            # In a thread, because it waits for the engine's processes to end, which takes seconds.
            with contextlib.suppress(VllmEngineDeadError):
                await asyncio.to_thread(llm.shutdown)

    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDeadError("the engine is not running")
        return self._llm


def _is_of(external_id: str, request_id: str) -> bool:
    """True when vLLM derived `external_id` from the `X-Request-Id` header `request_id`.

    Source: vLLM 0.32 `chatcmpl-<id>` and `cmpl-<id>-<prompt index>`.
    """
    if external_id == f"chatcmpl-{request_id}":
        return True
    head, _, index = external_id.rpartition("-")
    return head == f"cmpl-{request_id}" and index.isdigit()


class _TallyLogger(StatLoggerBase):
    """Hands vLLM's statistics to the tally as they arrive."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        self._tally.record(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        pass
