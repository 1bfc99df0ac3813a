# SPDX-License-Identifier: Apache-2.0
"""The table of request fields names every field that the installed vLLM takes, and no other."""

from __future__ import annotations

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from pools.client.request_fields import CHAT_ONLY, COMPLETIONS_ONLY, FIELDS, ON_BOTH_LEGS, on_both_legs


def test_every_field_of_vllm_has_its_place() -> None:
    """A field that comes with a new vLLM has to be placed before it is served, in one kind of request or in both."""
    chat, completions = set(ChatCompletionRequest.model_fields), set(CompletionRequest.model_fields)
    assert set(FIELDS) == chat | completions
    assert chat - completions == CHAT_ONLY
    assert completions - chat == COMPLETIONS_ONLY


def test_what_goes_on_both_legs_is_what_the_table_says() -> None:
    """But for the model, which each leg names itself; unset fields stay away."""
    assert {name for name, field in FIELDS.items() if field.legs == "both"} == {*ON_BOTH_LEGS, "model"}
    body = {"cache_salt": "a", "priority": -7, "session_id": None, "temperature": 0.5}
    assert on_both_legs(body) == {"cache_salt": "a", "priority": -7}
