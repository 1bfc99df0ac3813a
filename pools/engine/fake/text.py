# SPDX-License-Identifier: Apache-2.0
"""The text of the fake engine: a byte tokenizer, a chat template, and an answer that follows from the prompt alone.

The next token is a function of all tokens before it, as with a greedy model: an answer continued from prompt plus
the tokens already sent goes on identically, and two engines give the same answer to the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

WORD_BASE = 256
"""Ids below are UTF-8 bytes, ids from here on are the words of answers."""
NUM_WORDS = 4096
_MASK = (1 << 61) - 1
_MULTIPLIER = 1_181_783_497_276_652_981
_MEAN_ANSWER_TOKENS = 64


def encode(text: str) -> list[int]:
    """Token ids of `text`, one a byte. Words of answers come back as bytes too."""
    return list(text.encode())


def decode(token_ids: Iterable[int]) -> str:
    """Text of any token ids; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(bytes((t,)) if t < WORD_BASE else word(t).encode() for t in token_ids).decode(errors="replace")


def word(token_id: int) -> str:
    """Text of one answer token; plain ASCII that JSON never escapes."""
    return f" w{token_id - WORD_BASE}"


def render_chat(messages: Sequence[Any]) -> str:
    """The prompt of a chat: every message behind its role, then the assistant's turn.

    Raises ValueError for a message without a role.
    """
    parts: list[str] = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("each message needs a role")
        parts.append(f"<|{message['role']}|>{_content(message.get('content'))}\n")
    return "".join(parts) + "<|assistant|>"


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    raise ValueError("message content must be a string or a list of parts")


def fold(token_ids: Iterable[int], state: int = 0) -> int:
    """State after `token_ids`; fold(a + b) == fold(b, fold(a))."""
    for token in token_ids:
        state = (state * _MULTIPLIER + token + 1) & _MASK
    return state


def next_token(state: int) -> int:
    """The token that follows `state`."""
    return WORD_BASE + ((state >> 17) ^ (state >> 43)) % NUM_WORDS


def ends(state: int) -> bool:
    """True where an answer of no set length ends: after 64 tokens on average."""
    return ((state >> 29) ^ (state >> 7)) % _MEAN_ANSWER_TOKENS == 0


def token_at(prompt_token_ids: Iterable[int], i: int) -> int:
    """Token `i` (from 0) of the answer to a prompt."""
    return answer(prompt_token_ids, i + 1)[i]


def answer(prompt_token_ids: Iterable[int], max_tokens: int, *, may_end: bool = False) -> list[int]:
    """The first `max_tokens` tokens of the answer; fewer, at least one, when it `may_end` and does."""
    state = fold(prompt_token_ids)
    tokens: list[int] = []
    for _ in range(max_tokens):
        token = next_token(state)
        tokens.append(token)
        state = fold((token,), state)
        if may_end and ends(state):
            break
    return tokens
