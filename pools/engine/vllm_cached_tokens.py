# SPDX-License-Identifier: Apache-2.0
"""What a vLLM engine reports as `usage.prompt_tokens_details.cached_tokens`: tokens that some cache held before.

vLLM counts KV that a hand-off brings as cached, unless the prefill engine told it better, and counts for the second of
two answers to one prompt what the first one has just computed. Neither was cached when the request came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transport.handoff_params import DO_REMOTE_PREFILL


class CachedTokens:
    """Corrects the counts of one engine's `OutputProcessor`, on which it replaces two methods."""

    def __init__(self, output_processor: Any) -> None:
        self._states: dict[str, Any] = output_processor.request_states
        self._shared: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        """What was cached for the first answer, by the parent of all answers to one prompt."""
        self._probes: dict[str, int] = {}
        """What `had` returns, by the caller's id of each probe."""
        self._add, self._process = output_processor.add_request, output_processor.process_outputs
        output_processor.add_request = self._add_request
        output_processor.process_outputs = self._process_outputs

    def expect(self, request_id: str) -> None:
        """Remember for `had` what was cached for the request with this id, and leave vLLM's own count as it is."""
        self._probes[request_id] = 0

    def had(self, request_id: str) -> int:
        """Prompt tokens that this engine or its tiers held before, without what a hand-off brought. Forgets them."""
        return self._probes.pop(request_id, 0)

    def _add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        added = self._add(request, *args, **kwargs)
        params = (getattr(request.sampling_params, "extra_args", None) or {}).get("kv_transfer_params")
        if params and params.get(DO_REMOTE_PREFILL):
            state = self._states[request.request_id]
            # vLLM reports this figure in place of its own. It is what prefill had cached, where the hand-off says so.
            state.remote_prefill_cached_tokens = state.remote_prefill_cached_tokens or 0
        return added

    def _process_outputs(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            # Only a request's first token brings them.
            if output.prefill_stats is not None and (state := self._states.get(output.request_id)) is not None:
                self._count(state, output.prefill_stats)
        return self._process(outputs, *args, **kwargs)

    def _count(self, state: Any, stats: Any) -> None:
        by_prefill: int | None = state.remote_prefill_cached_tokens
        had: int = stats.num_cached_tokens if by_prefill is None else stats.num_local_cached_tokens
        if state.external_req_id in self._probes:
            self._probes[state.external_req_id] = had
            state.remote_prefill_cached_tokens = None
        elif by_prefill is not None:
            state.remote_prefill_cached_tokens = max(had, by_prefill)
        elif state.parent_req is not None:
            state.remote_prefill_cached_tokens = self._shared.setdefault(state.parent_req, had)
