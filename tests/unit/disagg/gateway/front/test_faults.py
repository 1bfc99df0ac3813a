# SPDX-License-Identifier: Apache-2.0
"""Requests at which the gateway itself fails."""

from __future__ import annotations

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from disagg.config import CorsConfig, GatewayConfig
from disagg.gateway.front.faults import Faults
from disagg.gateway.front.responses import error_response
from tests.support.gateway_stack import JSON_HEADERS, MODEL, running_stack
from transport.errors import DisaggError

PAGE = "https://page.example"


async def broken() -> None:
    raise RuntimeError("a fault")


async def test_a_page_can_read_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    """The answer has OpenAI's shape and the headers of CORS, and the log has the cause."""
    config = GatewayConfig(cors=CorsConfig(allow_origins=[PAGE]))
    async with running_stack(config=config) as stack:
        stack.renderer.before = broken
        body = {"model": MODEL, "prompt": "a"}
        reply = await stack.call("POST", "/v1/completions", body, [*JSON_HEADERS, ("origin", PAGE)])
        assert reply.status == 500
        assert reply.json()["error"]["type"] == "server_error"
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in reply.headers
        assert stack.metric("disagg_requests_total", endpoint="other", mode="none", code="500") == 1
        assert stack.gateway.bodies.num_bytes == stack.gateway.in_flight.num == 0
    assert "unexpected error at POST /v1/completions" in caplog.text and "a fault" in caplog.text


async def test_an_answer_that_has_begun_is_not_answered_again() -> None:
    """The fault goes to the server, which closes the connection."""
    sent: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("a fault")

    async def send(message: dict[str, object]) -> None:
        sent.append(str(message["type"]))

    def answer(request: Request, error: DisaggError) -> Response:
        return error_response(error)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    with pytest.raises(RuntimeError, match="a fault"):
        await Faults(app, answer=answer)(scope, None, send)  # type: ignore[arg-type]
    assert sent == ["http.response.start"]
