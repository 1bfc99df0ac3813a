# SPDX-License-Identifier: Apache-2.0
"""The routes of the gateway: which handler answers each route, and which key the route asks for.

`route_table` is the one list of the routes. FastAPI's routes, the checks of the edge and the security of the OpenAPI
document are made from this list.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from disagg.config import GatewayConfig
from disagg.errors import InvalidRequestError, ModelNotFoundError
from disagg.gateway.admin import Admin
from disagg.gateway.front import flags, openapi
from disagg.gateway.front.body import Bodies
from disagg.gateway.front.edge import Handler, KeyKind, Route, RouteTable
from disagg.gateway.front.fields import Endpoint
from disagg.gateway.front.intake import Asked, ClientDisconnect, check_body, request_id_of, take_store, taken_in
from disagg.gateway.front.leaving import unless_left
from disagg.gateway.handoff.local_prefill import no_replica
from disagg.gateway.ledger import query as ledger_query
from disagg.gateway.replicas.choosing import Chooser
from disagg.gateway.replicas.membership import POOLS, Membership
from disagg.gateway.stream.answering import Answering
from disagg.observability.metrics import Metrics
from disagg.routing.constraints import errand
from pools.errors import AttemptsExhaustedError, ReplicaLostError

logger = logging.getLogger(__name__)

_PASSED_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Model:
    """The one model of the application."""

    id: str
    created: int
    """Unix seconds."""
    max_model_len: int | None

    def card(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "disagg",
            "max_model_len": self.max_model_len,
        }


@dataclass(frozen=True)
class Api:
    """The handlers of the routes, over the parts of one gateway. No handler checks a key: the edge has done so.

    What their docstrings say stands in the OpenAPI document and in docs/api.md.
    """

    model: Model
    config: GatewayConfig
    bodies: Bodies
    membership: Membership
    chooser: Chooser
    answering: Answering
    admin: Admin
    metrics: Metrics
    echo_request_id: bool

    async def chat_completions(self, request: Request) -> Response:
        """The answer to a chat, whole or as a stream."""
        return self.answering.response(await self._taken_in(request, "chat"))

    async def completions(self, request: Request) -> Response:
        """The continuation of one or more prompts, whole or as a stream."""
        return self.answering.response(await self._taken_in(request, "completions"))

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a prompt or a chat, from one replica."""
        return await self._passed_on(request, "/tokenize")

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, from one replica."""
        return await self._passed_on(request, "/detokenize")

    async def list_models(self) -> Response:
        """The one model; `max_model_len` is the longest prompt plus answer, in tokens."""
        return JSONResponse({"object": "list", "data": [self.model.card()]})

    async def show_model(self, model_id: str) -> Response:
        """The model of this id."""
        if model_id != self.model.id:
            raise ModelNotFoundError(f"The model {model_id!r} does not exist; this server has {self.model.id!r}.")
        return JSONResponse(self.model.card())

    async def health(self) -> Response:
        """Whether requests are served, and by which pools."""
        status, body = self._health()
        return JSONResponse(body, status)

    async def prometheus(self) -> Response:
        """The metrics of the gateway replica that answers, as Prometheus reads them."""
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def pools(self) -> Response:
        """Both pools, with the state and the load of every replica."""
        return JSONResponse(await self.admin.pools())

    async def handoffs(self, request: Request) -> Response:
        """The books of hand-offs, and the newest records that pass the filter."""
        return JSONResponse(self.admin.handoffs(request.query_params.multi_items()))

    async def handoff(self, handoff_id: str) -> Response:
        """One record, by the id of its hand-off."""
        return JSONResponse(self.admin.handoff(handoff_id))

    async def scale(self, name: str, request: Request) -> Response:
        """Takes the new size of a pool, and answers before the pool has it."""
        with self.bodies.held() as held:
            _, body = await self.bodies.json_object(request, held)
        if not body:
            raise InvalidRequestError("num_replicas is missing", param="num_replicas")
        return JSONResponse(await self.admin.scale(name, body), 202)

    async def _taken_in(self, request: Request, endpoint: Endpoint) -> Asked:
        # A request counts from its head on: a body that takes its time takes memory, too.
        with self.answering.carried():
            return await taken_in(request, endpoint, bodies=self.bodies, model_id=self.model.id)

    async def _passed_on(self, request: Request, path: str) -> Response:
        """One replica's answer to a route that needs no KV."""
        with self.answering.carried(), self.bodies.held() as held:
            raw, body = await self.bodies.json_object(request, held)
            await check_body(body, self.config, model_id=self.model.id)
            _, raw = take_store(body, raw)
            try:
                return await unless_left(request.receive, self._passed(request, path, raw))
            except ClientDisconnect:
                self.metrics.disconnects.labels("decode").inc()
                return Response(status_code=499)

    async def _passed(self, request: Request, path: str, raw: bytes) -> Response:
        request_id, tried = request_id_of(request), frozenset[str]()
        while True:
            with self.chooser.reserve(errand(tried)) as reservation:
                if reservation.decision.refusal is not None:
                    raise no_replica(reservation.decision.refusal)
                if len(tried) >= self.config.max_attempts:
                    raise AttemptsExhaustedError(
                        f"the request was lost on {len(tried)} replicas, and no more are tried for it "
                        "(gateway.max_attempts)"
                    )
                member = reservation.answering
                try:
                    answer = await member.client.forward("POST", path, raw, timeout_s=_PASSED_TIMEOUT_S)
                except ReplicaLostError as exc:
                    logger.warning("request %s was lost on %s: %s", request_id, member.info.replica_id, exc)
                    if exc.unreachable:
                        self.membership.mark_unreachable(member)
                    tried |= {member.info.replica_id}
                    continue
            headers = {"x-request-id": request_id} if self.echo_request_id else {}
            payload = answer.payload
            if answer.status >= 400:
                payload = flags.in_answer(payload, self.answering.engine_arguments)
            return Response(payload, answer.status, headers, media_type="application/json")

    def _health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `/health`: 200 exactly when a request could be served."""
        application = self.membership.application()
        states = {pool: self.membership.pool_standing(pool) for pool in POOLS}
        return (503 if application.status == "unavailable" else 200), {
            "status": application.status,
            "reason": application.reason,
            "pools": {pool: self.membership.num_routable(pool) for pool in POOLS},
            "states": {pool: {"state": found.state, "reason": found.reason} for pool, found in states.items()},
            "num_warm_pairs": self.membership.num_warm_pairs(),
            "num_cold_pairs": len(self.membership.cold_pairs()),
        }


def route_table(api: Api, document: Handler) -> RouteTable:
    """Every route, with its key. `document` handles the route of the OpenAPI document. Raises UnstatedRouteError."""

    def reads(body: openapi.Body) -> dict[str, Any]:
        """The document of a route whose body is a completion request, or is passed on to an engine."""
        refusals = openapi.errors(400, 401, 404, 405, 408, 413, 415, 429, 431, 503)
        return {"openapi_extra": openapi.operation(openapi.reference(body)), "responses": refusals}

    def get(path: str, handler: Handler, key: KeyKind, **document: Any) -> Route:
        return Route("GET", path, handler, key, document)

    def post(path: str, handler: Handler, key: KeyKind, **document: Any) -> Route:
        return Route("POST", path, handler, key, document)

    refused = openapi.errors
    books = {"parameters": ledger_query.PARAMETERS}
    unavailable = {503: {"description": "No request could be served", "headers": openapi.RETRY_AFTER}}
    sizes = {"openapi_extra": openapi.operation(openapi.SCALE), "responses": refused(400, 401, 403, 404, 409)}
    return RouteTable(
        [
            post("/v1/chat/completions", api.chat_completions, "client", **reads("ChatBody")),
            post("/v1/completions", api.completions, "client", **reads("CompletionsBody")),
            post("/tokenize", api.tokenize, "client", **reads("TokenizeBody")),
            post("/detokenize", api.detokenize, "client", **reads("DetokenizeBody")),
            get("/v1/models", api.list_models, "client"),
            get("/v1/models/{model_id:path}", api.show_model, "client", responses=refused(404)),
            get("/health", api.health, "open", responses=unavailable),
            get("/metrics", api.prometheus, "open"),
            get("/admin/v1/pools", api.pools, "admin", responses=refused(401, 403)),
            post("/admin/v1/pools/{name}/scale", api.scale, "admin", status_code=202, **sizes),
            get("/admin/v1/handoffs", api.handoffs, "admin", openapi_extra=books, responses=refused(400, 401, 403)),
            get("/admin/v1/handoffs/{handoff_id}", api.handoff, "admin", responses=refused(401, 403, 404)),
            get("/openapi.json", document, "client", include_in_schema=False),
        ]
    )
