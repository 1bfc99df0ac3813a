# SPDX-License-Identifier: Apache-2.0
"""Token ids in an engine's answers: how to ask for them, and how to hide them from a client who did not. Pure."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from disagg.gateway.handoff.call import Call

IDS = "return_token_ids"

_IDS = b',"token_ids":['
_NO_IDS = b',"token_ids":null'
_PROMPT_IDS = b',"prompt_token_ids":['
_NO_PROMPT_IDS = b',"prompt_token_ids":null'

_encode = msgspec.json.Encoder().encode


def asking_for_ids(call: Call) -> Call:
    """The same request, which also makes the engine tell the ids of its tokens."""
    if call.body.get(IDS) is True:
        return call
    body = {**call.body, IDS: True}
    # Of two equal keys in JSON the last one wins. So a body that has the field already is encoded again.
    raw = _encode(body) if IDS in call.body else call.raw.replace(b"{", b'{"%b":true,' % IDS.encode(), 1)
    return replace(call, body=body, raw=raw)


def without_ids(document: bytes) -> bytes:
    """vLLM's JSON of one choice, an event or a whole answer, as vLLM writes it when nobody asks for token ids."""
    return _without(_without(document, _IDS, _NO_IDS), _PROMPT_IDS, _NO_PROMPT_IDS)


def _without(event: bytes, pattern: bytes, instead: bytes) -> bytes:
    start = event.find(pattern)
    return event if start < 0 else event[:start] + instead + event[event.find(b"]", start) + 1 :]
