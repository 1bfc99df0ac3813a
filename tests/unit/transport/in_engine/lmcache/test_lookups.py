# SPDX-License-Identifier: Apache-2.0
"""A look-up whose request is gone leaves no locks on the server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transport.in_engine.lmcache.lookups import AbandonedLookups


class Adapter:
    """LMCache's scheduler adapter, which notes what it is asked."""

    def __init__(self) -> None:
        self._pending_lookups = {"r"}
        self.hit_tokens: int | None = None
        self.calls: list[Any] = []

    def check_lookup_result(self, request_id: str) -> int | None:
        return self.hit_tokens

    def free_lookup_locks(self, **given: Any) -> None:
        self.calls.append(("free", given["request_id"], given["start"], given["end"], given["token_ids"]))

    def cleanup_lookup_result(self, request_id: str) -> None:
        self.calls.append(("cleanup", request_id))

    def end_session(self, request_id: str) -> None:
        self.calls.append(("end", request_id))


def tracker(request_id: str = "r") -> Any:
    return SimpleNamespace(request_id=request_id, get_token_ids=lambda: [1, 2], cache_salt="", request_configs=None)


def test_locks_are_given_back_when_the_answer_is_there() -> None:
    """Not before, and the session ends a step later, when the server has dealt with the locks."""
    adapter = Adapter()
    lookups = AbandonedLookups(adapter)
    assert lookups.add(tracker())
    lookups.step()
    assert adapter.calls == [] and lookups.has_work()
    adapter.hit_tokens = 512
    lookups.step()
    assert adapter.calls == [("free", "r", 0, 512, [1, 2]), ("cleanup", "r")] and lookups.has_work()
    lookups.step()
    assert adapter.calls[2:] == [("end", "r")] and not lookups.has_work()


def test_a_miss_locked_nothing() -> None:
    """Only the session is left to end."""
    adapter = Adapter()
    lookups = AbandonedLookups(adapter)
    adapter.hit_tokens = 0
    lookups.add(tracker())
    lookups.step()
    lookups.step()
    assert adapter.calls == [("cleanup", "r"), ("end", "r")]


def test_a_request_without_a_look_up_is_not_ours() -> None:
    """One that was never looked up, or whose locks LMCache has given back, ends as LMCache ends it."""
    lookups = AbandonedLookups(Adapter())
    assert not lookups.add(tracker("other")) and not lookups.has_work()


def test_an_id_used_anew_gets_no_old_answer() -> None:
    """The old answer is forgotten, and nothing is done for the old request any more."""
    adapter = Adapter()
    lookups = AbandonedLookups(adapter)
    lookups.add(tracker())
    lookups.forget("r")
    lookups.forget("other")
    lookups.step()
    assert adapter.calls == [("cleanup", "r")]
