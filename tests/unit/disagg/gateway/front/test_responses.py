# SPDX-License-Identifier: Apache-2.0
"""Every error of the project over HTTP."""

from __future__ import annotations

import json

import pytest

import disagg.errors
from disagg.errors import (
    ClientError,
    DisaggError,
    InvalidRequestError,
    ModelNotFoundError,
    NoReplicaError,
    PoolOverloadedError,
    RequestError,
)
from disagg.gateway.front.responses import STATUS, error_body, error_event, error_response, shape_of
from pools.errors import PoolError, ReplicaLostError


def _classes(root: type[DisaggError]) -> list[type[DisaggError]]:
    return [root] + [cls for child in root.__subclasses__() for cls in _classes(child) if cls.__module__ != __name__]


CLASSES = sorted(set(_classes(DisaggError)), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", CLASSES, ids=[cls.__name__ for cls in CLASSES])
def test_every_class_has_a_status(cls: type[DisaggError]) -> None:
    """Each error has a shape; the client's fault is 4xx, everything else 5xx."""
    shape = shape_of(cls("what happened"))
    assert (400 <= shape.status < 500) == issubclass(cls, RequestError)
    assert 400 <= shape.status < 600
    body = json.loads(json.dumps(error_body(cls("what happened"))))
    assert body["error"].keys() == {"message", "type", "param", "code"}
    if not issubclass(cls, ReplicaLostError):
        assert body["error"]["message"] == "what happened"


def test_every_request_error_has_a_line() -> None:
    """No error of the client takes another's status by accident, and the table names nothing unknown."""
    concrete = {cls for cls in CLASSES if issubclass(cls, RequestError)}
    assert concrete <= STATUS.keys() <= set(CLASSES)
    assert not any(issubclass(cls, ClientError) for cls in STATUS)
    assert {cls.__name__ for cls in STATUS} <= set(disagg.errors.__all__)


def test_a_new_class_takes_its_parents_line() -> None:
    """A subclass without a line answers as its parent."""

    class NewError(NoReplicaError):
        """For this test."""

    assert shape_of(NewError("x")) == STATUS[NoReplicaError]
    assert shape_of(PoolOverloadedError("x")).status == STATUS[PoolError].status == 503


def test_response_is_openai_shaped() -> None:
    """Status, headers and body of one error."""
    response = error_response(InvalidRequestError("no", param="n"), {"x-request-id": "r"})
    assert (response.status_code, response.headers["x-request-id"]) == (400, "r")
    assert json.loads(bytes(response.body)) == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": None}
    }
    assert error_body(ModelNotFoundError("x"))["error"]["code"] == "model_not_found"  # type: ignore[index]
    assert error_body(ModelNotFoundError("x", code="y"))["error"]["code"] == "y"  # type: ignore[index]


def test_a_loss_tells_no_addresses() -> None:
    """A client is told that a replica was lost, and why nobody goes on with its stream; not where the replica was."""
    for reason, words in ((None, ""), ("field:seed", "; the stream ends here: field:seed")):
        body = error_body(ReplicaLostError("the engine at http://10.0.0.3:1 lost the connection", reason=reason))
        assert body["error"]["message"] == f"the replica that worked on the request was lost{words}"  # type: ignore[index]


def test_event_ends_a_stream() -> None:
    """The error event is one line of JSON and `[DONE]` follows, also for a message with newlines."""
    event, done, end = error_event(NoReplicaError("two\nlines")).split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    assert b"\n" not in event
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == "two\nlines"
