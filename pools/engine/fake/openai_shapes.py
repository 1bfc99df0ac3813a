# SPDX-License-Identifier: Apache-2.0
"""The HTTP face of the fake engine: vLLM 0.32's request checks, JSON bodies and SSE chunks, as plain dicts and bytes.

Source: `vllm.entrypoints.openai.{chat_completion,completion}` and `vllm.entrypoints.serve`, 0.32. Knows nothing of
engines or sockets; what it does not model (logprobs, echo, tools) it refuses or leaves null.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from pools.engine.base import EngineStats, KVTransferParams
from pools.engine.fake.text import encode, render_chat

Endpoint = Literal["chat", "completion"]
DONE = b"data: [DONE]\n\n"
_DEFAULT_COMPLETION_TOKENS = 16


class WireError(Exception):
    """An error answer in vLLM's shape."""

    def __init__(self, status: int, message: str, *, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, kind=kind, param=param)


def error_body(status: int, message: str, *, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True)
class Generation:
    """One parsed request. `prompts` are token ids; every prompt is answered `n` times."""

    endpoint: Endpoint
    prompts: tuple[Sequence[int], ...]
    max_tokens: int
    may_end: bool
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    cache_salt: str
    kv_transfer_params: KVTransferParams | None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


def parse(endpoint: Endpoint, body: Any, *, model_id: str, max_model_len: int) -> Generation:
    """Parse the body of a request. Raises WireError with the answer that vLLM would give."""
    if not isinstance(body, dict):
        raise _invalid("Input should be a valid dictionary", "body")
    if body.get("model") not in (None, "", model_id):
        raise WireError(404, f"The model `{body['model']}` does not exist.", kind="NotFoundError", param="model")
    kv_transfer_params = body.get("kv_transfer_params")
    if kv_transfer_params is not None and not isinstance(kv_transfer_params, dict):
        raise _invalid("Input should be a valid dictionary", "body.kv_transfer_params")
    kv_transfer_params = dict(kv_transfer_params) if kv_transfer_params else None
    prompts = _chat_prompts(body, kv_transfer_params) if endpoint == "chat" else _completion_prompts(body)
    if any(not prompt for prompt in prompts):
        raise WireError(400, "The decoder prompt cannot be empty", param="prompt")
    stream = _flag(body, "stream")
    options = body.get("stream_options") or {}
    if options and not stream:
        raise _invalid("Stream options can only be defined when `stream=True`.", "stream_options")
    if not isinstance(options, dict):
        raise _invalid("Input should be a valid dictionary", "body.stream_options")
    if _flag(body, "echo"):
        raise WireError(400, "echo is not part of the fake engine", param="echo")
    asked = _max_tokens(endpoint, body)
    room = max_model_len - max(len(prompt) for prompt in prompts)
    _check_length(room, asked, max_model_len)
    stop = body.get("stop") or ()
    return Generation(
        endpoint=endpoint,
        prompts=prompts,
        max_tokens=room if asked is None else asked,
        may_end=asked is None and not _flag(body, "ignore_eos"),
        n=_count(body, "n", 1, low=1),
        stop=(stop,) if isinstance(stop, str) else tuple(str(item) for item in stop),
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("include_usage") and options.get("continuous_usage_stats")),
        return_token_ids=_flag(body, "return_token_ids"),
        cache_salt=str(body.get("cache_salt") or ""),
        kv_transfer_params=kv_transfer_params,
    )


def tokenize(body: Any, *, max_model_len: int) -> dict[str, Any]:
    """Answer of `/tokenize`, for a text or for a chat."""
    if not isinstance(body, dict):
        raise _invalid("Input should be a valid dictionary", "body")
    prompt = body.get("prompt")
    tokens = encode(prompt) if isinstance(prompt, str) else list(_chat_prompts(body, None)[0])
    return {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": None}


def token_ids_of(body: Any) -> list[int]:
    """The ids of a `/detokenize` request."""
    tokens = body.get("tokens") if isinstance(body, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise _invalid("Input should be a valid list of integers", "body.tokens")
    return tokens


def _invalid(message: str, param: str) -> WireError:
    return WireError(400, f"1 validation error:\n  {message}", kind="Bad Request", param=param)


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _invalid("Input should be a valid boolean", f"body.{key}")


def _count(body: dict[str, Any], key: str, default: int, *, low: int) -> int:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid("Input should be a valid integer", f"body.{key}")
    if value < low:
        raise WireError(400, f"{key} must be at least {low}, got {value}.", param=key)
    return value


def _max_tokens(endpoint: Endpoint, body: dict[str, Any]) -> int | None:
    if endpoint == "completion":
        return _count(body, "max_tokens", _DEFAULT_COMPLETION_TOKENS, low=1)
    key = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    return None if body.get(key) is None else _count(body, key, 1, low=1)


def _check_length(room: int, asked: int | None, max_model_len: int) -> None:
    if room >= (asked or 1):
        return
    num_tokens = max_model_len - room
    output = f" and {asked} output tokens were requested" if asked else ""
    raise WireError(
        400,
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
        f"{num_tokens} input tokens{output}. Please reduce the length of the input prompt or the output.",
        param="input_tokens",
    )


def _chat_prompts(body: dict[str, Any], kv_transfer_params: KVTransferParams | None) -> tuple[Sequence[int], ...]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _invalid("Field required", "body.messages")
    given = kv_transfer_params.pop("prompt_token_ids", None) if kv_transfer_params else None
    if given is not None:
        return (_ids(given, "kv_transfer_params.prompt_token_ids"),)
    try:
        return (encode(render_chat(messages)),)
    except ValueError as exc:
        raise _invalid(str(exc), "body.messages") from exc


def _completion_prompts(body: dict[str, Any]) -> tuple[Sequence[int], ...]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return (encode(prompt),)
    if not isinstance(prompt, list) or not prompt:
        raise _invalid("Field required", "body.prompt")
    if isinstance(prompt[0], int):
        return (_ids(prompt, "body.prompt"),)
    return tuple(encode(item) if isinstance(item, str) else _ids(item, "body.prompt") for item in prompt)


def _ids(value: Any, param: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise _invalid("Input should be a valid list of integers", param)
    return value


@dataclass(frozen=True)
class Choice:
    """One finished choice. `texts` has one entry a token; a stop string may have emptied the last ones."""

    tokens: Sequence[int]
    texts: Sequence[str]
    finish_reason: str
    stop_reason: str | None


def cut_at_stop(texts: Sequence[str], stop: Sequence[str]) -> tuple[list[str], str] | None:
    """`texts` up to the first stop string, and that string; None when none occurs."""
    text = "".join(texts)
    hits = [(text.find(item) + len(item), text.find(item), item) for item in stop if item and item in text]
    if not hits:
        return None
    end, keep, item = min(hits)
    cut: list[str] = []
    offset = 0
    for piece in texts:
        cut.append(piece[: max(0, keep - offset)])
        offset += len(piece)
        if offset >= end:
            break
    return cut, item


def held_back(texts: Sequence[str], text: str, stop: Sequence[str]) -> list[str]:
    """The text that each token adds to a stream. Text that may begin a stop string is held back for the next tokens.

    Args:
        texts: the text of each token.
        text: the whole answer, which a stop string may have cut.
    """
    keep = max(map(len, stop), default=1) - 1
    ends = [max(0, end - keep) for end in accumulate(map(len, texts))]
    return [text[start:end] for start, end in pairwise([0, *ends[:-1], len(text)])]


class Framing:
    """Bodies of one request's answer: SSE events, or the one JSON document."""

    def __init__(self, request: Generation, *, response_id: str, model_id: str) -> None:
        self._request = request
        self._id = response_id
        self._model_id = model_id
        self._created = int(time.time())
        self.num_cached = 0
        """`cached_tokens` of the answer, once it is known."""
        head = _dumps(self._head("chat.completion.chunk" if self._is_chat else "text_completion"))
        self._event = b"data: " + head[:-1] + b","
        self._plain = not (request.continuous_usage or request.return_token_ids)
        text_key = b'"delta":{"content":"' if self._is_chat else b'"text":"'
        self._before = [
            self._event + b'"choices":[{"index":%d,' % index + text_key
            for index in range(request.n * len(request.prompts))
        ]
        self._after = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
        if not self._is_chat:
            self._after = (
                b'","logprobs":null,"finish_reason":null,"stop_reason":null,'
                b'"prompt_token_ids":null,"token_ids":null}]}\n\n'
            )

    @property
    def _is_chat(self) -> bool:
        return self._request.endpoint == "chat"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model_id}

    def role(self, index: int) -> bytes:
        """First event of a chat choice; empty for completions, which have none."""
        if not self._is_chat:
            return b""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        prompt_token_ids = list(self._request.prompts[0]) if self._request.return_token_ids else None
        return self._chunk([choice], {"prompt_token_ids": prompt_token_ids, "prompt_text": None}, 0)

    def token(self, index: int, answer: Choice, i: int) -> bytes:
        """Event of token `i`; the last one carries the finish reason."""
        last = i == len(answer.texts) - 1
        if self._plain and not last:
            return self._before[index] + answer.texts[i].encode() + self._after
        request = self._request
        choice: dict[str, Any] = {"index": index}
        if self._is_chat:
            choice["delta"] = {"content": answer.texts[i]}
        else:
            choice["text"] = answer.texts[i]
        choice |= {"logprobs": None, "finish_reason": answer.finish_reason if last else None}
        if last or not self._is_chat:
            choice["stop_reason"] = answer.stop_reason if last else None
        if not self._is_chat:
            prompt = list(request.prompts[index // request.n])
            choice["prompt_token_ids"] = prompt if request.return_token_ids and i == 0 else None
        choice["token_ids"] = [answer.tokens[i]] if request.return_token_ids else None
        return self._chunk([choice], {}, i + 1)

    def usage(self, num_completion_tokens: int) -> bytes:
        """The event after the last token; empty unless `stream_options.include_usage`."""
        if not self._request.include_usage:
            return b""
        counts = _usage(self._request.num_prompt_tokens, num_completion_tokens)
        usage = _dumps(counts | {"prompt_tokens_details": {"cached_tokens": self.num_cached}})
        return self._event + b'"choices":[],"usage":' + usage + b"}\n\n"

    def _chunk(self, choices: list[dict[str, Any]], extra: dict[str, Any], num_completion_tokens: int) -> bytes:
        body: dict[str, Any] = {"choices": choices, **extra}
        if self._request.continuous_usage:
            body["usage"] = _usage(self._request.num_prompt_tokens, num_completion_tokens)
        return self._event + _dumps(body)[1:] + b"\n\n"

    def document(self, answers: Sequence[Choice], kv_transfer_params: KVTransferParams | None) -> dict[str, Any]:
        """The whole answer as one document."""
        num_tokens = sum(len(answer.tokens) for answer in answers)
        usage = _usage(self._request.num_prompt_tokens, num_tokens)
        details = {"cached_tokens": self.num_cached, "created_cache_tokens": None, "multimodal_tokens": None}
        usage |= {"prompt_tokens_details": details, "completion_tokens_details": None}
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        body = self._head("chat.completion" if self._is_chat else "text_completion")
        body |= {"choices": choices, "service_tier": None, "system_fingerprint": None, "usage": usage}
        if self._is_chat:
            prompt = list(self._request.prompts[0]) if self._request.return_token_ids else None
            body |= {"prompt_logprobs": None, "prompt_token_ids": prompt, "prompt_text": None}
        return body | {"kv_transfer_params": kv_transfer_params, "ec_transfer_params": None, "metrics": None}

    def _choice(self, index: int, answer: Choice) -> dict[str, Any]:
        request = self._request
        text = "".join(answer.texts)
        choice: dict[str, Any] = {"index": index}
        if self._is_chat:
            choice["message"] = {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            }
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
        if not self._is_chat:
            prompt = list(request.prompts[index // request.n]) if request.return_token_ids else None
            choice |= {"prompt_logprobs": None, "prompt_token_ids": prompt}
        choice["token_ids"] = list(answer.tokens) if request.return_token_ids else None
        return choice | {"routed_experts": None}


def error_event(status: int, message: str, *, kind: str) -> bytes:
    """An error inside a stream that already began."""
    return b"data: " + _dumps(error_body(status, message, kind=kind)) + b"\n\n"


def _dumps(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "completion_tokens": num_completion_tokens,
    }


def model_list(model_id: str, max_model_len: int) -> dict[str, Any]:
    """Answer of `/v1/models`."""
    card = {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "vllm", "root": model_id}
    return {"object": "list", "data": [card | {"parent": None, "max_model_len": max_model_len, "permission": []}]}


def metrics(stats: EngineStats, model_id: str) -> str:
    """Answer of `/metrics`: what vLLM calls the same numbers, in Prometheus text."""
    rows = (
        ("vllm:num_requests_running", "gauge", stats.num_requests_running),
        ("vllm:num_requests_waiting", "gauge", stats.num_requests_waiting),
        ("vllm:kv_cache_usage_perc", "gauge", stats.kv_cache_usage),
        ("vllm:prompt_tokens", "counter", stats.prompt_tokens_total),
        ("vllm:prompt_tokens_cached", "counter", stats.prompt_tokens_total - stats.prompt_tokens_computed_total),
        ("vllm:generation_tokens", "counter", stats.generation_tokens_total),
        ("vllm:nixl_num_failed_transfers", "counter", stats.nixl_num_failed_transfers_total),
        ("vllm:nixl_num_kv_expired_reqs", "counter", stats.num_kv_expired_reqs_total),
        ("vllm:nixl_bytes_transferred", "summary", stats.nixl_bytes_transferred_total),
    )
    labels = f'{{engine="0",model_name="{model_id}"}}'
    suffixes = {"gauge": "", "counter": "_total", "summary": "_sum"}
    lines: list[str] = []
    for name, kind, value in rows:
        lines += [f"# TYPE {name} {kind}", f"{name}{suffixes[kind]}{labels} {value}"]
    return "\n".join(lines) + "\n"
