# SPDX-License-Identifier: Apache-2.0
"""What every transport's descriptor keeps, whichever it is."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pools.engine.base import EngineStats
from transport.config import MooncakeConfig, NixlConfig, TransportConfig
from transport.descriptor import Transport
from transport.facts import EngineFacts, Role
from transport.handoff_params import DO_REMOTE_DECODE, DO_REMOTE_PREFILL, HANDOFF_ID, REMOTE_PREFILL
from transport.transports import STATISTICS, describe

CONFIGS: list[TransportConfig] = [NixlConfig(), NixlConfig(mode="push"), MooncakeConfig(type="mooncake")]
TRANSPORTS = [describe(config) for config in CONFIGS]
EVERY = pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)


def facts(role: Role, host: str = "10.0.0.5") -> EngineFacts:
    return EngineFacts(role=role, platform="cpu", host=host, listener_port=4711, engine_id=f"{role}-1")


def test_transports_have_names_of_their_own() -> None:
    """No two share a name, by which engines that cannot hand over to each other are told apart, or a class of vLLM."""
    assert len({transport.name for transport in TRANSPORTS}) == len(CONFIGS)
    assert len({transport.connector for transport in TRANSPORTS}) == len(CONFIGS) == len(STATISTICS)


@EVERY
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_an_engine_is_told_is_json_able(transport: Transport, role: Role) -> None:
    """Child and environment of either role survive a round trip, and the child is the class that is counted."""
    child, env = transport.child(facts(role)), transport.env(facts(role))
    assert json.loads(json.dumps([child, env])) == [child, env]
    assert child["kv_connector"] == transport.connector
    assert child["kv_role"] == {"prefill": "kv_producer", "decode": "kv_consumer"}[role]
    assert "engine_id" not in child


@EVERY
def test_what_is_counted_has_a_field(transport: Transport) -> None:
    """Each counter of the transport is one of the engine's statistics."""
    fields = {field.name for field in dataclasses.fields(EngineStats)}
    counters = [transport.statistics.bytes, *transport.statistics.cases]
    assert {f"{counter}_total" for counter in counters} <= fields
    assert STATISTICS[transport.connector] is transport.statistics


@EVERY
def test_the_legs_name_the_handoff(transport: Transport) -> None:
    """The decode leg says that the KV is elsewhere, where, and the hand-off's id; what it was given is in it."""
    at_once = transport.legs == "both_at_once"
    answered = {**REMOTE_PREFILL, "remote_block_ids": [[1]]}
    found = transport.source(facts("prefill")) if at_once else answered
    params = transport.decode_params("g-1", found)
    assert params[DO_REMOTE_PREFILL] is True and params[DO_REMOTE_DECODE] is False
    assert params[HANDOFF_ID] == "g-1"
    assert params.items() >= found.items()


@EVERY
def test_only_prefill_engines_publish_where_their_kv_is(transport: Transport) -> None:
    """They do where both legs are sent at once, and there alone."""
    published = transport.source(facts("prefill"))
    assert bool(published) == (transport.legs == "both_at_once")
    assert json.loads(json.dumps(published)) == published


@EVERY
def test_a_prefill_engine_can_be_asked(transport: Transport) -> None:
    """Its listener is at the port that was chosen, and an address of version 6 is put in brackets."""
    listener = transport.listener(facts("prefill"))
    assert listener is not None and (listener.host, listener.port) == ("10.0.0.5", 4711)
    listener = transport.listener(facts("prefill", host="fd00::5"))
    assert listener is not None and listener.url == "http://[fd00::5]:4711"
