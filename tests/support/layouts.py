# SPDX-License-Identifier: Apache-2.0
"""Engines of the tiny models of `layout_models`, and what a transport or a tier does with their KV."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pools.config import CpuConfig, ModelConfig, PoolConfig
from pools.engine.base import HANDOFF_HEADER
from pools.plan.launch import engine_args
from pools.plan.placement import placement
from tests.support.engines import SMALL
from tests.support.layout_models import MODELS, write
from tests.support.sink_stack import Engine, Server, prompt
from tests.support.stack import BUILD, ENGINE_KWARGS, engine_process, free_port, side_by_side
from transport.config import MooncakeConfig, NixlConfig, TransportConfig
from transport.facts import EngineFacts, Role
from transport.handoff_params import HANDOFF_ID, offer_params
from transport.kv_layouts import KvLayout
from transport.launch import launch
from transport.tiers import OffloadConfig, SharedCacheConfig, Sink
from transport.transports import describe

MODEL_OF: dict[KvLayout, str] = {
    "full_attention": "llama",
    "full_and_sliding_window": "gemma3",
    "sliding_window": "mistral",
    "mla_attention": "deepseek",
    "mamba": "qwen3_next",
    "short_conv": "lfm2",
    "cross_attention": "whisper",
}
PROMPTS = (prompt(1, 608), [*prompt(1, 608), *prompt(7, 192)], prompt(2, 640), prompt(3, 1008))
"""Six windows long and more, in whole blocks of MLA's 16 tokens. The second goes on where the first ends."""
WITHOUT_SHARED = (PROMPTS[0], *PROMPTS[2:])
FILLED = prompt(4, 639)
"""With one token more it fills its last block."""
OTHERS = tuple(prompt(seed, 600) for seed in range(100, 118))
TAIL = prompt(51, 40)
TRANSPORTS: dict[str, TransportConfig] = {
    "nixl": NixlConfig(),
    "nixl-push": NixlConfig(mode="push"),
    "mooncake": MooncakeConfig(type="mooncake"),
}


class StartError(RuntimeError):
    """An engine ended at its start; the message is its log."""


@dataclass(frozen=True)
class Running:
    """One engine, its model, and the facts that it was launched with."""

    model: str
    engine: Engine
    facts: EngineFacts

    @property
    def url(self) -> str:
        return self.engine.url

    def alone(self, tokens: Sequence[int], count: int = 16) -> list[int]:
        """What this engine answers without anything that is cached."""
        return self.engine.tokens(list(tokens), max_tokens=count, cache_salt=uuid.uuid4().hex)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=20).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

    def hits(self) -> int:
        """Prompt tokens that came from a tier so far."""
        return int(self.metric("vllm:external_prefix_cache_hits_total"))


@contextlib.contextmanager
def running(
    model: str,
    role: Role,
    transport: TransportConfig,
    models: Path,
    *,
    offload: OffloadConfig | None = None,
    cache: tuple[Sink, Server] | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[Running]:
    """One engine of a model of `MODELS`, whose checkpoint is written below `models`.

    Raises:
        StartError: it did not start.
    """
    facts = EngineFacts(
        role=role,
        platform="cpu",
        host="127.0.0.1",
        listener_port=free_port(),
        engine_id=f"{role}-{uuid.uuid4().hex[:8]}",
        lmcache_url=cache[1].url if cache else None,
    )
    shared = SharedCacheConfig(sink=cache[0], mq_timeout_s=5, heartbeat_interval_s=1) if cache else None
    plan = launch(transport, facts, offload=offload, shared_cache=shared)
    own = MODELS[model]().engine_kwargs
    kwargs = {**ENGINE_KWARGS, **SMALL, "max_num_batched_tokens": 8192, **own, **(engine_kwargs or {})}
    arguments = engine_args(
        ModelConfig(id="tiny", source=str(write(model, models)), engine_kwargs=kwargs),
        PoolConfig(),
        platform="cpu",
        kv_transfer_config=plan.kv_transfer_config,
        placement=placement("cpu", kwargs, CpuConfig()),
    )
    env = {**plan.env, "VLLM_SERVER_DEV_MODE": "1"}
    name = f"layouts-{model}-{facts.engine_id}"
    started = engine_process(arguments, env, role=role, name=name)
    try:
        url = started.__enter__()
    except RuntimeError as exc:
        raise StartError((BUILD / f"{name}.log").read_text(errors="replace")) from exc
    with contextlib.ExitStack() as stack:
        stack.push(started.__exit__)
        yield Running(model, Engine(url), facts)


def pair(
    model: str,
    transport: TransportConfig,
    models: Path,
    *,
    decode_offload: OffloadConfig | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
) -> AbstractContextManager[list[Running]]:
    """A prefill and a decode engine, started side by side."""
    return side_by_side(
        running(model, "prefill", transport, models, engine_kwargs=engine_kwargs),
        running(model, "decode", transport, models, offload=decode_offload, engine_kwargs=engine_kwargs),
    )


@dataclass(frozen=True)
class Outcome:
    """What became of the prompts."""

    num_wrong: int
    """Answers that are not those of one engine alone."""
    num_computed: int
    """Prompt tokens that the second engine, or the same one later, computed."""
    num_came: int
    """Prompt tokens whose KV came from the part."""

    def __str__(self) -> str:
        return f"{self.num_wrong} wrong, {self.num_came} tokens came, {self.num_computed} computed"


def answers_depend_on_kv(one: Running) -> bool:
    """Whether prompts that end alike are answered differently, so that wrong KV would show."""
    return one.alone([*prompt(50, 600), *TAIL]) != one.alone([*prompt(52, 600), *TAIL])


def prompts_of(one: Running) -> tuple[list[int], ...]:
    """`PROMPTS`; with MLA none that goes on where another one ends: vLLM's CPU build computes what follows kept latents
    otherwise than a whole prompt, and the answers of one engine alone are of whole prompts."""
    return WITHOUT_SHARED if one.model == MODEL_OF["mla_attention"] else PROMPTS


def hand_over(prefill: Running, decode: Running, transport: TransportConfig) -> Outcome:
    """Hand `PROMPTS` and `FILLED` over, each with the first token of its answer at its end.

    After a hand-off the decode engine computes the last token of the prompt as it computes answers. So the prompts end
    with a token that one engine alone computes in that way, too. Kernels for prompts round otherwise.
    """
    moves = describe(transport)
    num_wrong = num_computed = num_came = 0
    for tokens in (*prompts_of(decode), FILLED):
        first, *expected = decode.alone(tokens, 17)
        whole, handoff_id = [*tokens, first], f"layout-{uuid.uuid4().hex[:12]}"
        given = {**offer_params(handoff_id), **moves.prefill_params(handoff_id)}
        answer = _post(prefill, whole, given, max_tokens=1, headers={"x-request-id": handoff_id})
        found = answer["kv_transfer_params"] if moves.legs == "prefill_first" else moves.source(prefill.facts)
        before = decode.engine.stats()
        params = {**moves.decode_params(handoff_id, found), HANDOFF_ID: handoff_id}
        answer = _post(decode, whole, params, max_tokens=16, headers={HANDOFF_HEADER: handoff_id})
        num_wrong += answer["choices"][0]["token_ids"] != expected
        after = decode.engine.stats()
        num_computed += after["prompt_tokens_computed_total"] - before["prompt_tokens_computed_total"]
        num_came += after["prompt_tokens_p2p_total"] - before["prompt_tokens_p2p_total"]
    return Outcome(num_wrong, int(num_computed), int(num_came))


def keep_and_load(keeps: Running, loads: Running, keep: Callable[[Running], None]) -> Outcome:
    """Let `keeps` keep the KV of `PROMPTS` in a tier by `keep`, and ask them again of `loads`, which has forgotten.

    With MLA they are asked with the first token of their answer at their end, as in `hand_over`. It is all that is
    computed, since the rest is whole blocks.
    """
    num_asked = 1 if loads.model == MODEL_OF["mla_attention"] else 0
    asked = []
    for tokens in prompts_of(loads):
        answer = keeps.alone(tokens, 16 + num_asked)
        asked.append(([*tokens, *answer[:num_asked]], answer[num_asked:]))
    keep(keeps)
    hits, before = loads.hits(), loads.engine.stats()
    num_wrong = 0
    for whole, answer in asked:
        loads.engine.forget_prefixes()
        num_wrong += loads.engine.tokens(whole, max_tokens=16) != answer
    num_computed = loads.engine.stats()["prompt_tokens_computed_total"] - before["prompt_tokens_computed_total"]
    return Outcome(num_wrong, int(num_computed), loads.hits() - hits)


def answer_all(one: Running) -> None:
    """Answer `PROMPTS`, then so much else that what is stored with a later step is stored."""
    for tokens in prompts_of(one):
        one.engine.tokens(tokens)
    for number in range(10):
        one.engine.tokens(prompt(60 + number, 20), max_tokens=2)
        time.sleep(0.05)


def push_out(one: Running) -> None:
    """Answer `PROMPTS`, then other prompts until they have fallen out of the KV space."""
    answer_all(one)
    for tokens in OTHERS:
        one.engine.tokens(tokens)
    for number in range(20):
        one.engine.tokens(prompt(80 + number, 20), max_tokens=2)
        time.sleep(0.05)


def leave(one: Running) -> None:
    """Prefill legs of `PROMPTS` for clients that leave: nobody reads their KV."""
    for number, tokens in enumerate(prompts_of(one)):
        handoff_id = f"left-{number}-{uuid.uuid4().hex[:8]}"
        one.engine.prefill(list(tokens), handoff_id)
        one.engine.settle(handoff_id)
        one.engine.end_of(handoff_id)


def _post(
    one: Running, tokens: Sequence[int], params: Mapping[str, Any], *, max_tokens: int, headers: Mapping[str, str]
) -> dict[str, Any]:
    body = {
        "model": "tiny",
        "prompt": list(tokens),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "kv_transfer_params": dict(params),
    }
    answer = httpx.post(f"{one.url}/v1/completions", json=body, headers=dict(headers), timeout=120)
    answer.raise_for_status()
    return dict(answer.json())
