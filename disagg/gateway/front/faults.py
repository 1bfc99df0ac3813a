# SPDX-License-Identifier: Apache-2.0
"""The answer to a request at which the gateway itself failed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transport.errors import DisaggError

logger = logging.getLogger(__name__)


class Faults:
    """ASGI middleware: answers 500 in OpenAI's shape when the app raises before it has answered.

    Starlette calls a handler of `Exception` outside of all middleware, where the answer gets no header of
    `CORSMiddleware`: a page could not read it.
    """

    def __init__(self, app: ASGIApp, *, answer: Callable[[Request, DisaggError], Response]) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answered = False

        # Not a coroutine function: it is called for every chunk of a stream that is not spliced.
        def noting(message: Message) -> Awaitable[None]:
            nonlocal answered
            answered = True
            return send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            if answered:
                raise
            logger.exception("unexpected error at %s %s", scope["method"], scope["path"])
            error = DisaggError("internal error of the gateway; its log has the details")
            await self._answer(Request(scope), error)(scope, receive, send)
