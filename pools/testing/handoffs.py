# SPDX-License-Identifier: Apache-2.0
"""Checks of hand-offs between a prefill and a decode engine, over NIXL: legs, what becomes of the KV, probes."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from typing import Any

from pools.client import routes
from pools.engine.base import HANDOFF_HEADER
from pools.testing.client import request
from pools.testing.tools import (
    SETTLE_S,
    STREAM,
    Engines,
    answer_of,
    chat_body,
    completion_body,
    decode_leg,
    events_of,
    eventually,
    expect,
    expect_error,
    fate_of,
    fresh_prompt,
    get_json,
    growth_of,
    held_handoff,
    is_event,
    new_id,
    newest_event,
    post_json,
    prefill_leg,
    stats_of,
    streamed_events,
    streamed_ids,
    tokens_of,
)
from transport.handoff_params import DO_REMOTE_PREFILL, HANDOFF_ID, REMOTE_DECODE


async def prefill_leg_names_the_handoff(engines: Engines) -> None:
    """A prefill leg answers one token and parameters that name engine, request, blocks and address."""
    ids = await tokens_of(engines, engines.prompts[0])
    async with held_handoff(engines, ids) as params:
        stats = await stats_of(engines.prefill)
        expect(params["remote_engine_id"] == stats["engine_id"], f"{params['remote_engine_id']} is another engine")
        expect(bool(params["remote_request_id"]) and bool(params["remote_block_ids"]), f"incomplete: {params}")
        expect(isinstance(params["remote_host"], str) and params["remote_port"] > 0, f"no address: {params}")


async def same_tokens_with_and_without_handoff(engines: Engines) -> None:
    """A decode leg gives the tokens that the decode engine alone would, as document and as stream."""
    for prompt in engines.prompts:
        ids = await tokens_of(engines, prompt)
        body = completion_body(engines, ids) | {"cache_salt": uuid.uuid4().hex}
        first = await answer_of(engines, body | await decode_leg(engines, ids, salt=body["cache_salt"]))
        streamed = completion_body(engines, ids) | {"cache_salt": uuid.uuid4().hex} | STREAM
        leg = await decode_leg(engines, ids, salt=streamed["cache_salt"])
        events = await streamed_events(engines, "/v1/completions", streamed | leg)
        alone = (await answer_of(engines, completion_body(engines, ids)))["choices"][0]
        expect(first["choices"][0]["token_ids"] == alone["token_ids"], f"another answer to {prompt!r}")
        expect(streamed_ids(events[:-1]) == alone["token_ids"], f"another stream for {prompt!r}")


async def chat_handoff_takes_token_ids(engines: Engines) -> None:
    """A chat decode leg runs on `kv_transfer_params.prompt_token_ids` and answers as the chat alone."""
    body = chat_body(engines)
    question = {"model": engines.model, "messages": body["messages"]}
    ids = (await post_json(engines.decode, "/tokenize", question))["tokens"]
    leg = await decode_leg(engines, ids)
    leg["kv_transfer_params"]["prompt_token_ids"] = ids
    handed = await answer_of(engines, body | leg, "/v1/chat/completions")
    alone = await answer_of(engines, body, "/v1/chat/completions")
    expect(handed["choices"][0]["message"] == alone["choices"][0]["message"], "another answer")
    expect(handed["usage"]["prompt_tokens"] == len(ids), "usage does not count the given ids")


async def counts_a_handoff(engines: Engines) -> None:
    """A hand-off adds an admission and bytes on the decode engine, no failure, and spares it the prompt."""
    ids = await fresh_prompt(engines)
    before = await stats_of(engines.decode)
    await answer_of(engines, completion_body(engines, ids) | await decode_leg(engines, ids))

    async def counted() -> bool:
        grown = growth_of(before, await stats_of(engines.decode))
        return (
            grown["num_handoffs_admitted_total"] == 1
            and grown["nixl_bytes_transferred_total"] > 0
            and grown["nixl_num_failed_transfers_total"] == 0
            and grown["prompt_tokens_total"] == len(ids)
            and grown["prompt_tokens_computed_total"] < len(ids)
        )

    await eventually(counted, "the hand-off is not in the decode engine's stats")


async def a_lost_prefill_engine_costs_a_recompute(engines: Engines) -> None:
    """Parameters of an engine that is gone give the same answer, counted as a failed transfer."""
    ids = await fresh_prompt(engines)
    before = await stats_of(engines.decode)
    async with held_handoff(engines, ids) as params:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        gone = params | {"remote_engine_id": str(uuid.uuid4()), "remote_host": "127.0.0.1", "remote_port": port}
        handed = await answer_of(engines, completion_body(engines, ids) | {"kv_transfer_params": gone})
    alone = await answer_of(engines, completion_body(engines, ids))
    expect(handed["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"], "another answer")

    async def failed() -> bool:
        return growth_of(before, await stats_of(engines.decode))["nixl_num_failed_transfers_total"] >= 1

    await eventually(failed, "no failed transfer is counted")


async def says_what_became_of_a_handoff(engines: Engines) -> None:
    """The prefill engine's events say that it held the KV, how much, and that it was consumed."""
    ids = await fresh_prompt(engines)
    after = await newest_event(engines.prefill)
    leg = await decode_leg(engines, ids)
    handoff_id = leg["kv_transfer_params"][HANDOFF_ID]
    await answer_of(engines, completion_body(engines, ids) | leg)
    produced, ended = await fate_of(engines, handoff_id, after)
    expect(0 < produced["tokens"] <= len(ids) and produced["bytes"] > 0, f"{produced} for {len(ids)} tokens")
    expect(ended["outcome"] == "consumed" and ended["adopted"] is False, f"ended {ended}")
    expect(ended["lease_left_s"] is None or ended["lease_left_s"] > 0, f"lease left {ended['lease_left_s']}")
    expect(0 < produced["at"] <= ended["at"] <= time.time() + SETTLE_S, f"times {produced['at']}, {ended['at']}")


async def settle_frees_the_prefill_engine(engines: Engines) -> None:
    """Settling ends a hold at once, as released; doing it again, or for an unknown id, changes nothing."""
    usage = (await stats_of(engines.prefill))["kv_cache_usage"]
    after = await newest_event(engines.prefill)
    handoff_id = (await prefill_leg(engines, await fresh_prompt(engines)))[HANDOFF_ID]
    for ids in ([handoff_id], [handoff_id, "check-unknown-1"], []):
        said = await post_json(engines.prefill, routes.SETTLE, {"handoff_ids": ids})
        expect(said == {"settled": len(ids)}, f"settle said {said}")
    _, ended = await fate_of(engines, handoff_id, after)
    expect(ended["outcome"] == "released", f"ended {ended}")

    async def freed() -> bool:
        return bool((await stats_of(engines.prefill))["kv_cache_usage"] <= usage)

    await eventually(freed, "the prefill engine still holds the blocks")


async def settle_may_come_first(engines: Engines) -> None:
    """A hand-off that was settled before its leg came is released when it is produced."""
    after = await newest_event(engines.prefill)
    handoff_id = new_id()
    await post_json(engines.prefill, routes.SETTLE, {"handoff_ids": [handoff_id]})
    await prefill_leg(engines, await fresh_prompt(engines), handoff_id=handoff_id)
    _, ended = await fate_of(engines, handoff_id, after)
    expect(ended["outcome"] == "released", f"ended {ended}")


async def settle_after_the_read_changes_nothing(engines: Engines) -> None:
    """A consumed hand-off stays consumed, and ends once."""
    ids = await fresh_prompt(engines)
    after = await newest_event(engines.prefill)
    leg = await decode_leg(engines, ids)
    handoff_id = leg["kv_transfer_params"][HANDOFF_ID]
    await answer_of(engines, completion_body(engines, ids) | leg)
    await fate_of(engines, handoff_id, after)
    await post_json(engines.prefill, routes.SETTLE, {"handoff_ids": [handoff_id]})
    # Events come in order, so whatever settling did is told before what comes after it.
    later = (await prefill_leg(engines, await fresh_prompt(engines)))[HANDOFF_ID]
    await post_json(engines.prefill, routes.SETTLE, {"handoff_ids": [later]})
    await fate_of(engines, later, after)
    ends = [e["outcome"] for e in await events_of(engines.prefill, after) if is_event(e, "ended", handoff_id)]
    expect(ends == ["consumed"], f"ended {ends}")


async def parameters_are_used_once(engines: Engines) -> None:
    """Parameters that were admitted before are an error in the OpenAI shape, and the engine goes on."""
    ids = await fresh_prompt(engines)
    body = completion_body(engines, ids) | await decode_leg(engines, ids)
    await answer_of(engines, body)
    expect_error(await request("POST", f"{engines.decode}/v1/completions", body), None)
    await answer_of(engines, completion_body(engines, ids))


async def tells_what_it_never_took(engines: Engines) -> None:
    """A hand-off whose leg ends before the engine has its request is reported as unread, once; a read one is not."""
    ids = await fresh_prompt(engines)
    after = await newest_event(engines.decode)
    read = await prefill_leg(engines, ids)
    body = completion_body(engines, ids)
    reply = await request(
        "POST", f"{engines.decode}/v1/completions", body | {"kv_transfer_params": read}, headers=_names(read)
    )
    expect(reply.status == 200, f"the leg answered {reply.status}")
    async with held_handoff(engines, await fresh_prompt(engines)) as refused:
        bad = body | {"kv_transfer_params": refused, "max_tokens": -1}
        for _ in range(2):
            reply = await request("POST", f"{engines.decode}/v1/completions", bad, headers=_names(refused))
            expect_error(reply, 400)
        again = body | {"kv_transfer_params": refused}
        expect_error(await request("POST", f"{engines.decode}/v1/completions", again, headers=_names(refused)), None)
    unread = [event["id"] for event in await events_of(engines.decode, after) if event["kind"] == "unread"]
    expect(unread == [refused[HANDOFF_ID]], f"unread: {unread}")


def _names(params: dict[str, Any]) -> dict[str, str]:
    """The header of a decode leg that says which hand-off it brings."""
    return {HANDOFF_HEADER: params[HANDOFF_ID]}


async def events_are_a_long_poll(engines: Engines) -> None:
    """Reading events returns at once when there are some, waits when there are none, and refuses nonsense."""
    for url in (engines.prefill, engines.decode):
        after = await newest_event(url)
        began = time.monotonic()
        empty = await get_json(url, f"{routes.EVENTS}?after={after}&wait_s=0.2")
        expect(empty["events"] == [] and empty["next"] == after and empty["lost"] == 0, f"no news: {empty}")
        expect(0.15 < time.monotonic() - began < SETTLE_S, "an empty read did not wait as asked")
        expect(empty["incarnation"] == (await stats_of(url))["incarnation"], "another incarnation than in the stats")
        for query in ("after=x", "after=-1", "wait_s=31", "wait_s=-1", "wait_s=nan"):
            expect_error(await request("GET", f"{url}{routes.EVENTS}?{query}"), 400)
        for body in ({}, {"handoff_ids": "x"}, {"handoff_ids": [1]}):
            expect_error(await request("POST", url + routes.SETTLE, body), 400)
    after = await newest_event(engines.prefill)
    waiting = asyncio.create_task(get_json(engines.prefill, f"{routes.EVENTS}?after={after}&wait_s=30"))
    handoff_id = (await prefill_leg(engines, await fresh_prompt(engines)))[HANDOFF_ID]
    async with asyncio.timeout(SETTLE_S):
        news = await waiting
    expect(news["next"] > after and bool(news["events"]), f"news {news}")
    await post_json(engines.prefill, routes.SETTLE, {"handoff_ids": [handoff_id]})
    await fate_of(engines, handoff_id, after)


async def probe_runs_a_token(engines: Engines) -> None:
    """A probe of a new prompt runs one token through either engine and finds nothing cached."""
    for url in (engines.prefill, engines.decode):
        found = await post_json(url, routes.PROBE, {"prompt_token_ids": await fresh_prompt(engines)})
        expect(found["kv_transfer_params"] is None, f"unasked hand-off {found}")
        expect(found["finish_reason"] == "length", f"finish_reason {found['finish_reason']}")
        expect(found["num_cached_tokens"] == 0, f"{found['num_cached_tokens']} tokens of a new prompt are cached")


async def probe_follows_a_handoff(engines: Engines) -> None:
    """Two probes make a hand-off: the decode engine then computes no more than the last block."""
    ids = await fresh_prompt(engines)
    asked = {"prompt_token_ids": ids, "kv_transfer_params": REMOTE_DECODE}
    params = (await post_json(engines.prefill, routes.PROBE, asked))["kv_transfer_params"]
    expect(bool(params and params[DO_REMOTE_PREFILL]), f"no hand-off: {params}")
    body = {"prompt_token_ids": ids, "kv_transfer_params": params}
    found = await post_json(engines.decode, routes.PROBE, body)
    expect(found["num_cached_tokens"] > 0, "nothing came over")
    expect(found["num_cached_before"] == 0, f"{found['num_cached_before']} tokens of a new prompt were there before")


async def cached_tokens_were_there_before(engines: Engines) -> None:
    """`usage` counts what an engine had before the request, never what a hand-off brings or two answers share."""
    ids, handed, known = [await _blocks(engines) for _ in range(3)]
    several = completion_body(engines, ids) | {"n": 2, "temperature": 1.0}
    expect(_cached(await answer_of(engines, several)) == 0, "a new prompt is cached for its second answer")
    num_cached = _cached(await answer_of(engines, completion_body(engines, ids)))
    expect(num_cached > 0, "a prompt that was just computed is not cached")
    expect(_cached(await answer_of(engines, several)) == num_cached, "two answers of a cached prompt count otherwise")
    probed = await post_json(engines.decode, routes.PROBE, {"prompt_token_ids": ids})
    expect(probed["num_cached_before"] == num_cached, f"a probe found {probed} of a cached prompt")
    answer = await answer_of(engines, completion_body(engines, handed) | await decode_leg(engines, handed))
    expect(_cached(answer) == 0, f"{_cached(answer)} tokens that a hand-off brought count as cached")
    await post_json(engines.prefill, "/v1/completions", completion_body(engines, known))
    events = await streamed_events(
        engines, "/v1/completions", completion_body(engines, known) | STREAM | await decode_leg(engines, known)
    )
    expect(_cached(events[-1]) == num_cached, f"{events[-1]['usage']} of a prompt that prefill had")


async def _blocks(engines: Engines) -> list[int]:
    """A prompt that no engine has seen, of several blocks of KV: of part of a block no cache keeps anything."""
    return await fresh_prompt(engines) + [id for _ in range(8) for id in await fresh_prompt(engines)]


def _cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
