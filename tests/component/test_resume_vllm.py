# SPDX-License-Identifier: Apache-2.0
"""What resuming takes from vLLM: the bytes of its chunks, with token ids and without, and its detokeniser.

Contract tests: vLLM's own stream generators over made-up outputs, no engine.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import CompletionOutput, RequestOutput

from disagg.gateway.front.fields import Endpoint
from disagg.gateway.front.render import VllmRenderer
from disagg.gateway.stream.sent_tokens import SentTokens
from tests.support.stack import tiny_model

PROMPT = list(range(5, 25))
STEPS: list[tuple[str, list[int]]] = [("a", [1]), ("", [2]), ('"é\n],"token_ids":[', [3, 4]), ("", [5]), ("z", [6])]
ENDPOINTS = pytest.mark.parametrize("endpoint", ["chat", "completions"])


def outputs() -> list[RequestOutput]:
    made = []
    for i, (text, ids) in enumerate(STEPS):
        finish = "stop" if i == len(STEPS) - 1 else None
        output = CompletionOutput(0, text, ids, None, None, finish_reason=finish)
        made.append(RequestOutput("r", "prompt", PROMPT, None, [output], finish is not None))
    return made


def serving(cls: type) -> Any:
    made = object.__new__(cls)
    vars(made).update(
        parser_cls=None,
        enable_force_include_usage=False,
        enable_log_outputs=False,
        request_logger=None,
        enable_prompt_tokens_details=False,
        enable_per_request_metrics=False,
        system_fingerprint=None,
        response_role="assistant",
        _include_reasoning_tokens_details=False,
    )
    return made


async def chunks(endpoint: Endpoint, **fields: Any) -> list[bytes]:
    """vLLM's events for one request."""
    metadata = RequestResponseMetadata(request_id="r")

    async def results() -> AsyncIterator[Any]:
        for output in outputs():
            yield output if endpoint == "chat" else (0, output)

    if endpoint == "chat":
        chat = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], stream=True, **fields)
        stream = serving(OpenAIServingChat).chat_completion_stream_generator(
            chat, results(), "r", "tiny", [], None, metadata
        )
    else:
        completion = CompletionRequest(prompt=PROMPT, stream=True, **fields)
        stream = serving(OpenAIServingCompletion).completion_stream_generator(
            completion, [{}], results(), "r", 7, "tiny", num_prompts=1, tokenizer=None, request_metadata=metadata
        )
    return [chunk.encode() async for chunk in stream]


def same_time(event: bytes) -> bytes:
    head, _, tail = event.partition(b'"created":')
    return head + tail[tail.find(b",") :] if tail else event


@ENDPOINTS
@pytest.mark.parametrize("usage", [{}, {"include_usage": True, "continuous_usage_stats": True}])
async def test_chunks_are_those_of_who_did_not_ask(endpoint: Endpoint, usage: dict[str, bool]) -> None:
    """With the ids cut out, each of vLLM's chunks is byte for byte the one that it writes without them."""
    options = {"stream_options": usage} if usage else {}
    asked = await chunks(endpoint, return_token_ids=True, **options)
    plain = await chunks(endpoint, **options)
    assert b'"token_ids":[1]' in b"".join(asked) and b'"prompt_token_ids":[5,' in b"".join(asked)
    sent = SentTokens(endpoint, client_ids=False)
    assert [same_time(sent.feed(event)) for event in asked] == [same_time(event) for event in plain]
    sent.parse()
    assert list(sent.token_ids) == [1, 2, 3, 4, 5, 6] and sent.text == "".join(text for text, _ in STEPS)
    assert (sent.done, sent.finish_reason, sent.refusal) == (True, "stop", None)


@pytest.fixture(scope="module")
def renderer() -> VllmRenderer:
    return VllmRenderer({"model": str(tiny_model()), "max_model_len": 1024, "dtype": "float32"})


def kept(texts: Sequence[str]) -> list[int]:
    """The places where a cut can be: behind a token that gave text."""
    return [i + 1 for i, text in enumerate(texts) if text]


@pytest.mark.parametrize("seed", range(20))
async def test_text_does_not_depend_on_the_seam(renderer: VllmRenderer, seed: int) -> None:
    """Tokens give the same text when those before them are part of the prompt."""
    rng = random.Random(seed)
    size = len(renderer._online.renderer.tokenizer)
    prompt, ids = ([rng.randrange(size) for _ in range(n)] for n in (12, 40))
    texts = await renderer.texts({}, prompt, ids)
    assert len(texts) == len(ids)
    for k in kept(texts):
        assert await renderer.texts({}, [*prompt, *ids[:k]], ids[k:]) == texts[k:]


async def test_half_a_character_gives_no_text(renderer: VllmRenderer) -> None:
    """The bytes of a character that is not complete wait for the rest."""
    tokenizer = renderer._online.renderer.tokenizer
    ids = tokenizer.encode("a語語", add_special_tokens=False)
    texts = await renderer.texts({}, PROMPT, ids)
    assert "".join(texts) == "a語語" and all("�" not in text for text in texts)
    assert texts[:-1] == await renderer.texts({}, PROMPT, ids[:-1])
