# SPDX-License-Identifier: Apache-2.0
"""Chat template and tokeniser of the gateway: vLLM's own renderer, without an engine.

It is the code that the engines run, so that the tokens are the same. The one module of the gateway that imports
vLLM. Tokenising happens in vLLM's thread pool, off the event loop; large bodies are validated aside of it, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from disagg.errors import InvalidRequestError
from disagg.gateway.front.aside import Aside
from disagg.gateway.front.fields import Endpoint
from disagg.gateway.front.openapi import REFERENCE, Body
from pools.borrowed import BORROWED
from transport.upstream.guard import require

logger = logging.getLogger(__name__)

_SMALL_BYTES = 16_384
"""Bodies up to this size are rendered in the gateway's loop: some 600 content parts, which take a few milliseconds."""
_MAX_ASIDE = 4
"""Larger bodies that are rendered at once."""


class Renderer(Protocol):
    """Turns a request into token ids."""

    async def prompts(self, endpoint: Endpoint, body: Mapping[str, Any], num_bytes: int) -> list[list[int]] | None:
        """Token ids of each prompt; None when the engine itself has to look at the request (to refuse it, mostly).

        Args:
            num_bytes: size of the body as JSON. Large bodies are rendered aside of the caller's event loop.

        Raises:
            InvalidRequestError: the request is nested deeper than its reader can go.
        """
        ...

    async def texts(self, body: Mapping[str, Any], prompt: Sequence[int], token_ids: Sequence[int]) -> list[str]:
        """The text that each token of an answer adds as it is streamed; empty where it waits for the next token."""
        ...

    def schemas(self) -> dict[str, Any]:
        """JSON schemas of every `openapi.Body` as vLLM takes it, and of what they refer to, by name."""
        ...


def has_media(body: Mapping[str, Any]) -> bool:
    """Whether a chat has content that is not text. vLLM's client for media belongs to one event loop."""
    messages = body.get("messages")
    return any(
        isinstance(part, Mapping) and part.get("type", "text") != "text"
        for message in (messages if isinstance(messages, list) else ())
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


class VllmRenderer:
    """vLLM's `OnlineRenderer` over a model's tokeniser.

    Args:
        arguments: vLLM's engine and frontend arguments, as the engines get them.
    Raises:
        Exception: whatever vLLM raises for a model it cannot read.
    Source:
        vLLM 0.32 `entrypoints/launchers/render`, which serves the same renderer without an engine.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        from vllm.config import VllmConfig
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest
        from vllm.renderers import renderer_from_config
        from vllm.renderers.chat_utils import load_chat_template
        from vllm.renderers.online_renderer import OnlineRenderer

        from pools.engine import vllm_media
        from pools.engine._vllm_compat import split_args

        vllm_media.install()
        vllm_media.guard_tokenizers(arguments.get("allowed_media_domains"))
        require(BORROWED, "disagg.gateway.front.render")
        left_out = {"kv_transfer_config", "worker_extension_cls", "distributed_executor_backend"}
        engine_args, args = split_args({k: v for k, v in arguments.items() if k not in left_out})
        model_config = engine_args.create_model_config()
        model_config.quantization = None
        config = VllmConfig(
            model_config=model_config, structured_outputs_config=engine_args.create_structured_outputs_config()
        )
        self._online = OnlineRenderer(
            model_config=model_config,
            renderer=renderer_from_config(config),
            request_logger=None,
            chat_template=load_chat_template(args.chat_template),
            chat_template_content_format=args.chat_template_content_format,
            trust_request_chat_template=args.trust_request_chat_template,
            trust_request_mm_kwargs=args.trust_request_mm_kwargs,
            enable_auto_tools=args.enable_auto_tool_choice,
            exclude_tools_when_tool_choice_none=args.exclude_tools_when_tool_choice_none,
            tool_parser=args.tool_call_parser,
            tool_strict_level=args.tool_strict_level,
            reasoning_parser=args.reasoning_parser or config.structured_outputs_config.reasoning_parser,
            default_chat_template_kwargs=args.default_chat_template_kwargs,
        )
        self._online.warmup()
        self._models = {"chat": ChatCompletionRequest, "completions": CompletionRequest}
        self._bodies: dict[Body, Any] = {
            "ChatBody": ChatCompletionRequest,
            "CompletionsBody": CompletionRequest,
            "TokenizeBody": TokenizeRequest,
            "DetokenizeBody": DetokenizeRequest,
        }
        self._error = ErrorResponse
        self._aside = Aside("renderer", max_at_once=_MAX_ASIDE)
        self.max_model_len: int = model_config.max_model_len

    async def prompts(self, endpoint: Endpoint, body: Mapping[str, Any], num_bytes: int) -> list[list[int]] | None:
        if num_bytes <= _SMALL_BYTES or has_media(body):
            return await self._prompts(endpoint, body)
        return await self._aside.run(lambda: self._prompts(endpoint, body))

    async def _prompts(self, endpoint: Endpoint, body: Mapping[str, Any]) -> list[list[int]] | None:
        try:
            # The models' validators edit what they are given; the client's body stays as it is.
            request = self._models[endpoint].model_validate(dict(body))
            if endpoint == "chat":
                rendered = await self._online.render_chat(request, skip_mm_cache=True)
                inputs = rendered[1] if isinstance(rendered, tuple) else rendered
            else:
                inputs = await self._online.render_completion(request, skip_mm_cache=True)
        except RecursionError as exc:
            # An engine would fail, and so would the next one.
            raise InvalidRequestError("the request is nested too deep for this server") from exc
        except Exception as exc:
            # A request that vLLM's code refuses here is refused by the engine with the same words, in its own shape.
            logger.debug("not rendered: %s", exc)
            return None
        if isinstance(inputs, self._error):
            return None
        if any(item.get("type") != "token" for item in inputs):
            return None
        return [list(item["prompt_token_ids"]) for item in inputs]

    async def texts(self, body: Mapping[str, Any], prompt: Sequence[int], token_ids: Sequence[int]) -> list[str]:
        """The same detokeniser that runs in the engines, over the same tokens; in a thread."""
        return await asyncio.to_thread(self._texts, dict(body), list(prompt), list(token_ids))

    def schemas(self) -> dict[str, Any]:
        mode: JsonSchemaMode = "validation"
        bodies = [(name, mode, TypeAdapter(model)) for name, model in self._bodies.items()]
        schemas, rest = TypeAdapter.json_schemas(bodies, ref_template=REFERENCE)
        return {**rest.get("$defs", {}), **{name: schema for (name, _), schema in schemas.items()}}

    def _texts(self, body: Mapping[str, Any], prompt: list[int], token_ids: list[int]) -> list[str]:
        from pools.engine._vllm_compat import incremental_detokenizer

        detokenizer = incremental_detokenizer(
            self._online.renderer.tokenizer,
            prompt,
            skip_special_tokens=body.get("skip_special_tokens") is not False,
            spaces_between_special_tokens=body.get("spaces_between_special_tokens") is not False,
        )
        ends = [0]
        for token_id in token_ids:
            detokenizer.update([token_id], False)
            ends.append(len(detokenizer.output_text))
        text = detokenizer.output_text
        return [text[start:end] for start, end in pairwise(ends)]
