# SPDX-License-Identifier: Apache-2.0
"""Names this project's setting in error answers that name a flag of vLLM's command line. Pure.

vLLM's refusals say what to start `vllm serve` with, which nobody does here.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import msgspec

SETTING = "args.model.engine_kwargs."
"""Where an engine argument is set, for both pools."""

_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
_EVENT = b"data: "
_ERROR_EVENT = b'data: {"error"'

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


def with_settings(message: str, arguments: Collection[str]) -> str:
    """`message`, followed by the setting of each flag in it. Without such a flag it stays as it is.

    Args:
        arguments: names of the engine arguments that a config may set, with underscores.
    """
    named = dict.fromkeys(flag.replace("-", "_") for flag in _FLAG.findall(message))
    settings = [SETTING + name for name in named if name in arguments]
    return f"{message} (here: {', '.join(settings)})" if settings else message


def in_answer(payload: bytes, arguments: Collection[str]) -> bytes:
    """A whole error answer of an engine, its message `with_settings`. What is no error in JSON stays as it is."""
    if b"--" not in payload:
        return payload
    try:
        answer = _decode(payload)
        message = answer["error"]["message"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return payload
    if not isinstance(message, str) or (told := with_settings(message, arguments)) == message:
        return payload
    answer["error"]["message"] = told
    return _encode(answer)


def in_first_chunk(chunk: bytes, arguments: Collection[str]) -> bytes:
    """The first chunk of a stream. Where it is an error event, its message is `with_settings`; else it stays as it is.

    What vLLM finds wrong when the answer has begun to be a stream is told so, with status 200.
    """
    if not chunk.startswith(_ERROR_EVENT):
        return chunk
    event, end, rest = chunk.removeprefix(_EVENT).partition(b"\n")
    return _EVENT + in_answer(event, arguments) + end + rest
