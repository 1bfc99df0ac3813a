# SPDX-License-Identifier: Apache-2.0
"""Line 8: the column `platform: cpu` of the table of KV layouts, each cell on real engines with a tiny model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.prove.report import Row
from tests.support.layouts import (
    MODEL_OF,
    PROMPTS,
    TRANSPORTS,
    Outcome,
    StartError,
    answer_all,
    answers_depend_on_kv,
    hand_over,
    keep_and_load,
    leave,
    pair,
    push_out,
    running,
)
from tests.support.sink_stack import Server, lmcache_server
from tests.support.stack import forked_engines
from transport.kv_layouts import KV_LAYOUTS, Known, KvLayout
from transport.parts import PARTS, Part
from transport.tiers import OffloadConfig

LINE = 8
LITTLE_SPACE: dict[str, Any] = {
    "num_gpu_blocks_override": 256,
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
}
"""8,192 tokens in blocks of 32, the least with which a model of three groups starts."""
ONE_GROUP: dict[str, Any] = {"disable_hybrid_kv_cache_manager": True}


@dataclass(frozen=True)
class Look:
    """One cell: a part, a model, and what else its engines are told."""

    part: Part
    layout: KvLayout
    models: Path
    more: dict[str, Any]

    @property
    def model(self) -> str:
        return MODEL_OF[self.layout]

    @property
    def transport(self) -> Any:
        """That of a tier's engine: one that takes the layout."""
        return TRANSPORTS["mooncake" if self.layout == "short_conv" else "nixl"]

    def outcome(self) -> Outcome:
        """Raises StartError when an engine does not start."""
        if self.part.name in TRANSPORTS:
            transport = TRANSPORTS[self.part.name]
            with pair(self.model, transport, self.models, engine_kwargs=self.more) as (prefill, decode):
                assert answers_depend_on_kv(decode)
                return hand_over(prefill, decode, transport)
        if self.part.field == "shared_cache":
            with lmcache_server() as server:
                return self._shared(self.part.name.removeprefix("shared_cache (sink: ").removesuffix(")"), server)
        if self.part.name == "offload":
            with self._running(offload=OffloadConfig(cpu_gib=0.25)) as one:
                return keep_and_load(one, one, answer_all)
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            offload = OffloadConfig.model_validate({"cpu_gib": 0.125, "disk": {"path": directory}})
            first, second = (stack.enter_context(self._running(offload=offload)) for _ in range(2))
            return keep_and_load(first, second, answer_all)

    def _shared(self, sink: Any, server: Server) -> Outcome:
        match sink:
            case "unused":
                with self._running(cache=(sink, server)) as one:
                    return keep_and_load(one, one, leave)
            case "evicted":
                with self._running(LITTLE_SPACE, cache=(sink, server)) as one:
                    return keep_and_load(one, one, push_out)
            case "write_through":
                with self._running(cache=(sink, server)) as one:
                    return keep_and_load(one, one, answer_all)
        # Another engine fills what this one reads, if any can.
        with self._running(cache=(sink, server)) as one:
            try:
                with self._running(cache=("write_through", server)) as other:
                    return keep_and_load(other, one, answer_all)
            except StartError:
                return keep_and_load(one, one, answer_all)

    def _running(self, more: dict[str, Any] | None = None, **tier: Any) -> Any:
        kwargs = {**self.more, **(more or {})}
        return running(self.model, "prefill", self.transport, self.models, engine_kwargs=kwargs, **tier)


def kv_layouts() -> list[Row]:
    """Every cell, then what the actions that the table names come to."""
    with _models() as models:
        rows = [row for layout in KV_LAYOUTS for row in of_layout(layout, models)]
        return rows + of_one_group(models)


def of_layout(layout: KvLayout, models: Path) -> list[Row]:
    """The cells of one layout."""
    return [_row(Look(part, layout, models, {}), part.layouts["cpu"][layout]) for part in PARTS]


def of_one_group(models: Path) -> list[Row]:
    """Gemma 3 without vLLM's hybrid KV cache manager is as full attention; a model with states does not start."""
    rows = [
        _row(Look(part, "full_and_sliding_window", models, ONE_GROUP), part.layouts["cpu"]["full_attention"])
        for part in PARTS
    ]
    refused = Known("refused", error="Failed to promote local KV cache specs to one unified type")
    return [*rows, _row(Look(PARTS[0], "mamba", models, ONE_GROUP), refused)]


@contextmanager
def _models() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="disagg-layouts-") as directory, forked_engines():
        yield Path(directory)


def _row(look: Look, known: Known) -> Row:
    what = f"{look.part.name}: {look.layout}" + (", one group" if look.more else "")
    try:
        outcome = look.outcome()
    except StartError as exc:
        told = known.error in str(exc) if known.error else False
        figure = f'"{known.error}"'[:90] if told else f"did not start: {_last_error(str(exc))}"[:90]
        return Row(LINE, what, figure, known.state, known.state == "refused" and told)
    state = "wrong" if outcome.num_wrong else _state(look.part, outcome)
    return Row(LINE, what, str(outcome), known.state, state == known.state)


def _state(part: Part, outcome: Outcome) -> str:
    if part.name in TRANSPORTS:
        return "works" if outcome.num_computed <= len(PROMPTS) + 1 else "partly"
    return "works" if outcome.num_came else "partly"


def _last_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "Error:" in line]
    return lines[-1] if lines else "no error in its log"
