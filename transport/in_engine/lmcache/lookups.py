# SPDX-License-Identifier: Apache-2.0
"""Look-ups whose request ended before it got blocks. No vLLM or LMCache imports.

A look-up locks the chunks that it finds on the server, until they are read or given back. LMCache gives them back when
the request gets its blocks, and forgets a request that ends before. This code waits for the answer over the next steps,
never inside a step, and gives back the chunks. It ends the request's session on the server one step later, because the
server may reorder the two messages.

Source:
    LMCache 0.5.6 `LMCacheMPSchedulerAdapter`, `modules/lookup.py`: `free_lookup_locks`, `end_session`.
"""

from __future__ import annotations

from typing import Any


class AbandonedLookups:
    """Bounded: within its own time-out LMCache gets the answer to a look-up or gives the look-up up."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._waiting: dict[str, Any] = {}
        self._to_end: list[str] = []

    def add(self, tracker: Any) -> bool:
        """The request of this LMCache tracker ended. False when no look-up of it is open."""
        if tracker.request_id not in self._adapter._pending_lookups:
            return False
        self._waiting[tracker.request_id] = tracker
        return True

    def forget(self, request_id: str) -> None:
        """The id is used anew: the new request must not get the answer of the old one."""
        if self._waiting.pop(request_id, None) is not None:
            self._adapter.cleanup_lookup_result(request_id)

    def has_work(self) -> bool:
        """Whether the engine must keep stepping."""
        return bool(self._waiting or self._to_end)

    def step(self) -> None:
        """To be called once in each scheduler step."""
        for request_id in self._to_end:
            self._adapter.end_session(request_id)
        self._to_end = []
        for request_id, tracker in list(self._waiting.items()):
            hit_tokens = self._adapter.check_lookup_result(request_id)
            if hit_tokens is None:
                continue
            if hit_tokens:
                self._adapter.free_lookup_locks(
                    token_ids=tracker.get_token_ids(),
                    start=0,
                    end=hit_tokens,
                    request_id=request_id,
                    cache_salt=tracker.cache_salt,
                    request_configs=tracker.request_configs,
                )
            self._adapter.cleanup_lookup_result(request_id)
            del self._waiting[request_id]
            self._to_end.append(request_id)
