# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: the contract, wire shapes and timing of vLLM, on no GPU and little CPU.

Answers follow from the prompt alone (`pools.engine.fake.text`), so an answer after a hand-off can be compared with
one without. Hand-offs are real in all but the bytes: held, leased, read once, settled, and reported in events.
Sends raw ASGI messages, one a token. `python -m pools.engine.fake --help` runs one by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pools.config import FakeEngineConfig
from pools.engine.base import ASGIApp, EngineStats, KVTransferParams, ProbeResult, Receive, Role, Scope, Send
from pools.engine.events import EventLog
from pools.engine.fake import openai_shapes as wire
from pools.engine.fake.kv import KV_BYTES_PER_TOKEN, FakeKV, num_blocks_of
from pools.engine.fake.openai_shapes import Choice, Framing, Generation, WireError
from pools.engine.fake.side_channel import SideChannel, named, read_handoff
from pools.engine.fake.text import NUM_WORDS, WORD_BASE, answer, decode, fold, word
from pools.engine.fake.tiers import FakeSharedCache
from pools.engine.handoffs import Admissions, consumed_by
from pools.errors import EngineDeadError, EngineStartError, HandoffRefusedError
from transport.config import NixlConfig
from transport.descriptor import Transport
from transport.facts import EngineFacts
from transport.handoff_params import (
    DO_REMOTE_DECODE,
    DO_REMOTE_PREFILL,
    PREFILL_HAD,
    REMOTE_PREFILL,
    STORE,
    handoff_id_of,
)
from transport.transports import describe

_STEP_S = 0.02
"""Longest wait between two looks at whether a request was aborted."""
_JSON = (b"content-type", b"application/json")
_SSE = (b"content-type", b"text/event-stream; charset=utf-8")
_NIXL = describe(NixlConfig())


@dataclass(eq=False)
class _Running:
    request_id: str
    """The caller's `X-Request-Id`."""
    internal_id: str
    aborted: bool = False
    unread: str | None = None
    """The hand-off that a decode engine took and has not tried to read yet."""


@dataclass(frozen=True)
class _Hits:
    """Prompt tokens of one request that are not computed."""

    num_cached: int
    """All of them."""
    num_held: int
    """Those that this engine or its shared tier held before."""
    prefill_had: int = 0
    """Those that the prefill engine held before, as it says in a hand-off."""

    @property
    def reported(self) -> int:
        """`cached_tokens` of the answer."""
        return max(self.num_held, self.prefill_had)


class FakeEngine:
    """Keeps `pools.engine.base.Engine`. Use it from one event loop."""

    def __init__(
        self,
        engine_id: str,
        role: Role,
        config: FakeEngineConfig,
        *,
        model_id: str,
        max_model_len: int | None = None,
        host: str = "127.0.0.1",
        listener_port: int = 0,
        kv_lease_duration_s: float = 30.0,
        transport: Transport = _NIXL,
        shared_cache: FakeSharedCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`host` and `listener_port` (0: the kernel chooses) are where decode engines read hand-offs; `clock` tells the
        time of leases only. A lease lasts `kv_lease_duration_s`, which may be a fraction of a second, and not as long
        as `transport` says.
        """
        self._engine_id = engine_id
        self._transport = transport
        self._shared_cache = shared_cache
        self._log = EventLog()
        self._role = role
        self._config = config
        self._model_id = model_id
        self._max_model_len = max_model_len or config.max_model_len
        self._kv = FakeKV(
            num_blocks=max(1, config.kv_tokens // config.block_size),
            block_size=config.block_size,
            lease_s=kv_lease_duration_s,
            clock=clock,
            events=self._log,
            shared_cache=shared_cache,
        )
        self._side_channel = SideChannel(self._kv, engine_id=engine_id, host=host, port=listener_port)
        self._requests: set[_Running] = set()
        self._num_waiting = 0
        self._prefill_free_at = 0.0
        self._counts: Counter[str] = Counter()
        self._handoffs = Admissions(self._log)
        self._app = self._handoffs.watch(lambda scope, receive, send: self._serve(scope, receive, send))
        self._dead: BaseException | None = None
        self._stopped = False
        self._routes: dict[tuple[str, str], Callable[[Scope, Receive, Send], Any]] = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completion,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("GET", "/v1/models"): self._models,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/health"): self._health,
        }

    @property
    def engine_id(self) -> str:
        return self._engine_id

    @property
    def block_size(self) -> int:
        return self._config.block_size

    @property
    def vocab_size(self) -> int:
        return WORD_BASE + NUM_WORDS

    @property
    def app(self) -> ASGIApp:
        return self._app

    @property
    def events(self) -> EventLog:
        return self._log

    @property
    def facts(self) -> EngineFacts:
        """What the replica knows of this engine. Valid after `start`."""
        host, port = self._side_channel.host, self._side_channel.port
        return EngineFacts(role=self._role, platform="cpu", host=host, listener_port=port, engine_id=self._engine_id)

    @property
    def kv_source(self) -> dict[str, Any]:
        """What the replica publishes about where this engine's KV is. Valid after `start`."""
        return self._transport.source(self.facts) if self._role == "prefill" else {}

    @property
    def dead(self) -> BaseException | None:
        return self._dead

    async def start(self) -> None:
        try:
            await self._side_channel.start()
        except OSError as exc:
            channel = self._side_channel
            raise EngineStartError(f"side channel cannot listen on {channel.host!r} port {channel.port}") from exc
        await asyncio.sleep(self._config.startup_s)

    def fail(self, error: BaseException) -> None:
        """Die as an engine core does: running requests end with an error, new ones are refused."""
        self._dead = error

    async def abort(self, request_id: str) -> bool:
        found = [running for running in self._requests if running.request_id == request_id]
        for running in found:
            running.aborted = True
        return bool(found)

    async def settle(self, handoff_ids: Sequence[str]) -> None:
        self._kv.settle(handoff_ids)

    async def reset_prefix_cache(self) -> bool:
        return self._kv.reset_cache()

    async def probe(
        self,
        prompt_token_ids: Sequence[int],
        kv_transfer_params: KVTransferParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        session_id: str | None = None,
    ) -> ProbeResult:
        """As the protocol says; also raises HandoffRefusedError for parameters that were used before."""
        generation = wire.parse(
            "completion",
            {
                "prompt": list(prompt_token_ids),
                "max_tokens": 1,
                "kv_transfer_params": kv_transfer_params,
                "cache_salt": cache_salt,
            },
            model_id=self._model_id,
            max_model_len=self._max_model_len,
        )
        with self._track("probe", uuid.uuid4().hex) as running:
            self._admit(generation, running)
            async with self._prefilled(generation, running) as hits:
                self._counts["generation_tokens"] += 1
            params = self._hand_off(generation, running, hits)
        if self._dead is not None:
            raise EngineDeadError(f"engine {self._engine_id!r} is dead: {self._dead}")
        return ProbeResult(hits.num_cached, params, "abort" if running.aborted else "length", hits.num_held)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests_running=len(self._requests) - self._num_waiting,
            num_requests_waiting=self._num_waiting,
            kv_cache_usage=self._kv.usage,
            prompt_tokens_total=self._counts["prompt_tokens"],
            prompt_tokens_computed_total=self._counts["prompt_tokens_computed"],
            generation_tokens_total=self._counts["generation_tokens"],
            nixl_bytes_transferred_total=self._counts["nixl_bytes"],
            nixl_num_failed_transfers_total=self._counts["failed_transfers"],
            num_kv_expired_reqs_total=self._kv.num_expired,
            num_handoffs_admitted_total=self._handoffs.num_admitted,
        )

    async def shutdown(self) -> None:
        self._stopped = True
        for running in self._requests:
            running.aborted = True
        await self._side_channel.stop()

    @contextlib.contextmanager
    def _track(self, prefix: str, request_id: str) -> Iterator[_Running]:
        if self._dead is not None or self._stopped:
            raise EngineDeadError(f"engine {self._engine_id!r} is dead: {self._dead or 'shut down'}")
        running = _Running(request_id, f"{prefix}-{request_id}-{uuid.uuid4().hex[:8]}")
        self._requests.add(running)
        try:
            yield running
        finally:
            self._requests.discard(running)
            if running.unread is not None and self._dead is None:
                self._log.append({"kind": "unread", "at": time.time(), "id": running.unread})

    def _admit(self, generation: Generation, running: _Running) -> None:
        """Take the request's hand-off, if it has one. Raises HandoffRefusedError when it was taken before."""
        params = generation.kv_transfer_params
        handoff = consumed_by(params) if self._role == "decode" and named(params) else None
        if handoff is not None:
            self._handoffs.admit(handoff)
            running.unread = handoff.id

    @contextlib.asynccontextmanager
    async def _prefilled(self, generation: Generation, running: _Running) -> AsyncIterator[_Hits]:
        """Hold KV space and fetch or compute the prompt; yields how many prompt tokens were not computed here.

        Yields early when the request is aborted or the engine dies.
        """
        num_blocks = await self._hold(generation, running)
        try:
            hits = await self._local_and_remote_hits(generation, running)
            num_computed = generation.num_prompt_tokens - hits.num_cached
            self._counts["prompt_tokens"] += generation.num_prompt_tokens
            self._counts["prompt_tokens_computed"] += num_computed
            now = asyncio.get_running_loop().time()
            done_at = max(now, self._prefill_free_at) + num_computed * self._config.prefill_ms_per_1k_tokens / 1e6
            self._prefill_free_at = done_at
            await self._sleep_until(done_at, running)
            for prompt in generation.prompts:
                self._kv.cache(prompt, generation.cache_salt)
            yield hits
        finally:
            self._kv.free(num_blocks)

    async def _hold(self, generation: Generation, running: _Running) -> int:
        size = self._config.block_size
        need = sum(num_blocks_of(len(prompt) + generation.max_tokens, size) for prompt in generation.prompts)
        need = min(need, self._kv.num_blocks)
        self._num_waiting += 1
        try:
            while True:
                if self._over(running):
                    return 0
                room = len(self._requests) - self._num_waiting < self._config.max_num_seqs
                if room and self._kv.try_hold(need):
                    return need
                await asyncio.sleep(_STEP_S)
        finally:
            self._num_waiting -= 1

    async def _local_and_remote_hits(self, generation: Generation, running: _Running) -> _Hits:
        hits = [self._kv.cached_tokens(prompt, generation.cache_salt) for prompt in generation.prompts]
        params = generation.kv_transfer_params
        if params and params.get(DO_REMOTE_PREFILL) and self._role == "decode":
            num_held = sum(hits)
            hits[0] = await self._fetch(params, generation.prompts[0], hits[0], running)
            return _Hits(sum(hits), num_held, int(params.get(PREFILL_HAD) or 0))
        if self._shared_cache is not None:
            salt = generation.cache_salt
            pairs = zip(generation.prompts, hits, strict=True)
            hits = [self._load(prompt, salt, local, self._shared_cache) for prompt, local in pairs]
        return _Hits(sum(hits), sum(hits))

    def _load(self, prompt: Sequence[int], salt: str, num_local: int, shared_cache: FakeSharedCache) -> int:
        """Load what the shared tier has beyond the local hits; returns the prompt tokens that need no computing."""
        chunks = shared_cache.found(prompt, salt)
        num_found = min(len(chunks) * shared_cache.chunk_tokens, len(prompt) - 1)
        if num_found <= num_local:
            return num_local
        chunks = chunks[num_local // shared_cache.chunk_tokens :]
        event = {"kind": "loaded", "at": time.time(), "source": "lmcache"}
        self._log.append(event | {"tokens": num_found - num_local, "chunks": chunks})
        return num_found

    async def _fetch(self, params: KVTransferParams, prompt: Sequence[int], num_local: int, running: _Running) -> int:
        """Read a hand-off; returns the prompt tokens that need no computing, `num_local` when it failed."""
        reading = asyncio.ensure_future(read_handoff(params, lease_s=self._kv.lease_s))
        while not reading.done():
            if self._over(running):
                reading.cancel()
            await asyncio.wait({reading}, timeout=_STEP_S)
        if reading.cancelled():
            return num_local
        running.unread = None
        handoff = reading.result()
        if handoff is None or handoff["prompt_state"] != fold(prompt):
            self._counts["failed_transfers"] += 1
            return num_local
        num_remote = int(handoff["num_tokens"]) - num_local
        self._counts["nixl_bytes"] += num_remote * KV_BYTES_PER_TOKEN
        await asyncio.sleep(num_remote * self._config.transfer_ms_per_1k_tokens / 1e6)
        return len(prompt) - 1

    def _hand_off(self, generation: Generation, running: _Running, hits: _Hits) -> KVTransferParams | None:
        """Hold a finished prompt for a decode engine, and return the parameters with which that engine reads it.

        Returns None when both legs are sent at once, because the decode engine has the parameters already.
        """
        params = generation.kv_transfer_params
        if self._role != "prefill" or not params or not params.get(DO_REMOTE_DECODE) or self._over(running):
            return None
        prompt = generation.prompts[0]
        handoff_id = handoff_id_of(params, running.internal_id)
        at_once = self._transport.legs == "both_at_once"
        key = str(params.get("transfer_id") or handoff_id) if at_once else running.internal_id
        block_ids = self._kv.pin(handoff_id, prompt, keys=[key], salt=generation.cache_salt, store=params.get(STORE))
        # A lease must end by itself, also when nobody calls the engine.
        asyncio.get_running_loop().call_later(self._kv.lease_s + _STEP_S, self._kv.expire)
        if at_once:
            return None
        return {
            **REMOTE_PREFILL,
            "remote_block_ids": [block_ids],
            "remote_engine_id": self._engine_id,
            "remote_request_id": running.internal_id,
            "remote_host": self._side_channel.host,
            "remote_port": self._side_channel.port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": len(prompt),
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            PREFILL_HAD: hits.num_held,
        }

    def _over(self, running: _Running) -> bool:
        return running.aborted or self._dead is not None

    async def _sleep_until(self, when: float, running: _Running) -> None:
        """Sleep until the loop's clock shows `when`, or the request is over."""
        loop = asyncio.get_running_loop()
        while (left := when - loop.time()) > 0 and not self._over(running):
            await asyncio.sleep(min(left, _STEP_S))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"unsupported protocol {scope['type']!r}")
        route = self._routes.get((scope["method"], scope["path"]))
        try:
            if route is None:
                known = any(path == scope["path"] for _, path in self._routes)
                status, phrase = (405, "Method Not Allowed") if known else (404, "Not Found")
                raise WireError(status, phrase, kind=phrase)
            await route(scope, receive, send)
        except WireError as exc:
            await _send_json(send, exc.status, exc.body)
        except HandoffRefusedError as exc:
            await _send_json(send, 409, wire.error_body(409, str(exc), kind="HandoffRefusedError"))
        except EngineDeadError as exc:
            await _send_json(send, 500, wire.error_body(500, str(exc), kind="InternalServerError"))
        except _CallerLeft:
            return

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate("chat", "chatcmpl", scope, receive, send)

    async def _completion(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate("completion", "cmpl", scope, receive, send)

    async def _generate(self, endpoint: wire.Endpoint, prefix: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_json(scope, receive)
        generation = wire.parse(endpoint, body, model_id=self._model_id, max_model_len=self._max_model_len)
        request_id = _header(scope, b"x-request-id") or uuid.uuid4().hex
        with self._track(prefix, request_id) as running:
            self._admit(generation, running)
            framing = Framing(generation, response_id=f"{prefix}-{request_id}", model_id=self._model_id)
            watcher = asyncio.create_task(_watch(receive, running))
            try:
                respond = self._stream if generation.stream else self._answer_whole
                await respond(generation, framing, running, send)
            finally:
                watcher.cancel()

    async def _stream(self, generation: Generation, framing: Framing, running: _Running, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [_SSE]})
        async with self._prefilled(generation, running) as hits:
            framing.num_cached = hits.reported
            if not self._over(running):
                for index in range(generation.n * len(generation.prompts) if generation.endpoint == "chat" else 0):
                    await send(_body(framing.role(index)))
            num_sent = await self._stream_tokens(self._answers(generation), framing, running, send)
        self._hand_off(generation, running, hits)
        if self._dead is not None:
            event = wire.error_event(500, f"engine is dead: {self._dead}", kind="InternalServerError")
            await send(_body(event))
        elif (usage := framing.usage(num_sent)) and not running.aborted:
            await send(_body(usage))
        await send({"type": "http.response.body", "body": wire.DONE, "more_body": False})

    async def _stream_tokens(self, answers: Sequence[Choice], framing: Framing, running: _Running, send: Send) -> int:
        """Send the tokens on an absolute schedule, so that a late one does not delay the next. Returns how many."""
        loop = asyncio.get_running_loop()
        itl_s, num_sent = self._config.itl_ms / 1e3, 0
        begin = loop.time()
        if self._config.shared_steps and itl_s:
            begin -= begin % itl_s
        for i in range(max(len(choice.tokens) for choice in answers)):
            if i:
                delay = begin + i * itl_s - loop.time()
                if delay > _STEP_S:
                    await self._sleep_until(begin + i * itl_s, running)
                else:
                    await asyncio.sleep(delay)
            if self._over(running):
                if self._dead is None:
                    aborted = Choice((0,), ("",), "abort", None)
                    await send(_body(framing.token(0, aborted, 0)))
                break
            for index, choice in enumerate(answers):
                if i < len(choice.tokens):
                    await send(_body(framing.token(index, choice, i)))
                    num_sent += 1
                    self._counts["generation_tokens"] += 1
        return num_sent

    async def _answer_whole(self, generation: Generation, framing: Framing, running: _Running, send: Send) -> None:
        async with self._prefilled(generation, running) as hits:
            framing.num_cached = hits.reported
            answers = self._answers(generation)
            num_steps = max(len(choice.tokens) for choice in answers) - 1
            begin = asyncio.get_running_loop().time()
            await self._sleep_until(begin + num_steps * self._config.itl_ms / 1e3, running)
        params = self._hand_off(generation, running, hits)
        if self._dead is not None:
            raise EngineDeadError(f"engine {self._engine_id!r} is dead: {self._dead}")
        if running.aborted:
            answers = [Choice((), (), "abort", None) for _ in answers]
        self._counts["generation_tokens"] += sum(len(choice.tokens) for choice in answers)
        await _send_json(send, 200, framing.document(answers, params))

    def _answers(self, generation: Generation) -> list[Choice]:
        """Every choice, prompt by prompt; the `n` choices of one prompt are alike, as under greedy sampling."""
        answers: list[Choice] = []
        for prompt in generation.prompts:
            tokens = answer(prompt, generation.max_tokens, may_end=generation.may_end)
            texts = [word(token) for token in tokens]
            ended = generation.may_end and len(tokens) < generation.max_tokens
            choice = Choice(tokens, texts, "stop" if ended else "length", None)
            if cut := wire.cut_at_stop(texts, generation.stop):
                choice = Choice(tokens[: len(cut[0])], cut[0], "stop", cut[1])
            streamed = wire.held_back(texts[: len(choice.texts)], "".join(choice.texts), generation.stop)
            choice = replace(choice, texts=streamed)
            answers += [choice] * generation.n
        return answers

    async def _tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_json(scope, receive)
        await _send_json(send, 200, wire.tokenize(body, max_model_len=self._max_model_len))

    async def _detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_json(scope, receive)
        await _send_json(send, 200, {"prompt": decode(wire.token_ids_of(body))})

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _send_json(send, 200, wire.model_list(self._model_id, self._max_model_len))

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _send(send, 200 if self._dead is None else 503, (b"content-type", b"text/plain"), b"")

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = wire.metrics(self.stats(), self._model_id)
        await _send(send, 200, (b"content-type", b"text/plain; version=0.0.4; charset=utf-8"), text.encode())


class _CallerLeft(Exception):
    """The connection closed before the request was read."""


async def _watch(receive: Receive, running: _Running) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    running.aborted = True


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _read_json(scope: Scope, receive: Receive) -> Any:
    chunks: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _CallerLeft
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    if not _header(scope, b"content-type").lower().startswith("application/json"):
        raise WireError(400, "Unsupported Media Type: Only 'application/json' is allowed", kind="Bad Request")
    try:
        return json.loads(b"".join(chunks))
    except ValueError as exc:
        raise WireError(400, f"1 validation error:\n  JSON decode error: {exc}", kind="Bad Request") from exc


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _body(payload: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": payload, "more_body": True}


async def _send_json(send: Send, status: int, body: dict[str, Any]) -> None:
    await _send(send, status, _JSON, json.dumps(body, separators=(",", ":")).encode())


async def _send(send: Send, status: int, content_type: tuple[bytes, bytes], payload: bytes) -> None:
    length = (b"content-length", str(len(payload)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [content_type, length]})
    await send({"type": "http.response.body", "body": payload})
