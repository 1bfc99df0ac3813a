# SPDX-License-Identifier: Apache-2.0
"""The gateway without Ray: its parts put together, and the FastAPI app over them.

`disagg.gateway.deployment` runs it in Serve; tests run it under plain uvicorn with the same code.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

import disagg
from disagg.config import GatewayConfig
from disagg.errors import (
    InvalidRequestError,
    MethodNotAllowedError,
    ModelNotFoundError,
    NotFoundError,
    RequestError,
)
from disagg.gateway.admin import Admin, AdminKey, Scaler
from disagg.gateway.background import Background
from disagg.gateway.front import openapi
from disagg.gateway.front.api_keys import keys_of
from disagg.gateway.front.edge import Edge, key_for, tenant_of
from disagg.gateway.front.fields import Endpoint
from disagg.gateway.front.in_flight import InFlight
from disagg.gateway.front.intake import (
    ClientDisconnect,
    check_fields,
    forwarded_headers,
    parse_json,
    read_body,
    request_id_of,
    take_store,
)
from disagg.gateway.front.limits import check_prompt_tokens, check_prompts
from disagg.gateway.front.render import Renderer
from disagg.gateway.front.responses import error_response, shape_of
from disagg.gateway.front.tenants import check_media_ids, salted
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.handoff import Handoff
from disagg.gateway.handoff.local_prefill import no_replica
from disagg.gateway.handoff.transfers import transfer_for
from disagg.gateway.handoff.warm import PairWarmer
from disagg.gateway.ledger import query as ledger_query
from disagg.gateway.ledger.feed import LedgerFeed
from disagg.gateway.ledger.foreign import foreign_ledger
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.replicas.choosing import Chooser
from disagg.gateway.replicas.kv_paths import KvPaths
from disagg.gateway.replicas.membership import POOLS, Membership
from disagg.gateway.replicas.serving import SERVING
from disagg.gateway.replicas.watch import Watch
from disagg.gateway.shadow.shadow import Shadow, show_paths
from disagg.gateway.stream.answering import Answering
from disagg.gateway.stream.resuming import Resumer
from disagg.observability.metrics import Metrics
from disagg.routing.constraints import errand
from disagg.routing.policies import policy_for
from pools.client.registry import ReplicaClients
from pools.client.replica import Limits
from pools.errors import AttemptsExhaustedError, NoReplicaError, PoolOverloadedError, ReplicaLostError
from transport.descriptor import Transport
from transport.errors import DisaggError
from transport.handoff_params import Store

logger = logging.getLogger(__name__)

_SWEEP_S = 0.5
_CLOSE_TIMEOUT_S = 10.0
_PASSED_TIMEOUT_S = 60.0
_LEASE_MARGIN_S = 600.0
"""Longer than any lease."""


class Gateway:
    """One gateway replica. Create it in the event loop that serves it."""

    def __init__(
        self,
        *,
        model_id: str,
        config: GatewayConfig,
        renderer: Renderer,
        scaler: Scaler,
        max_model_len: int | None,
        transport: Transport,
        echo_request_id: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Blocks on the files of keys. Raises ConfigError when they cannot be read.

        Args:
            echo_request_id: put `x-request-id` on responses; False behind a server that does so itself.
            environment: where API keys are looked for when the configuration names a variable.
        """
        self.model_id = model_id
        self.config = config
        self.max_model_len = max_model_len
        self.echo_request_id = echo_request_id
        self.created = int(time.time())
        self.renderer = renderer
        self.metrics = Metrics()
        self.api_keys = keys_of(
            config,
            environment or {},
            on_reload=lambda ok: self.metrics.key_reloads.labels("ok" if ok else "failed").inc(),
        )
        self.ledger = Ledger(
            num_records=config.ledger_records,
            # A decode leg may hold a hand-off that long, then its lease ends it.
            unknown_after_s=config.prefill_timeout_s + config.first_byte_timeout_s + _LEASE_MARGIN_S,
            on_count=self.metrics.count_handoff,
            on_lease_left=self.metrics.lease_left_seconds.observe,
        )
        self.metrics.open_handoffs.set_function(lambda: self.ledger.num_open)
        self.foreign = foreign_ledger(
            self.ledger,
            num_records=config.ledger_records,
            unknown_after_s=config.prefill_timeout_s + config.first_byte_timeout_s + _LEASE_MARGIN_S,
            on_count=self.metrics.count_foreign,
        )
        self.background = Background()
        self.in_flight = InFlight()
        self.clients = ReplicaClients(
            connect_timeout_s=config.connect_timeout_s,
            limits=Limits(
                first_byte_timeout_s=config.first_byte_timeout_s,
                idle_timeout_s=config.idle_timeout_s,
                stall_timeout_s=config.client_stall_timeout_s,
            ),
            observer=self.metrics,
        )
        self.membership = Membership(
            lambda info: self.clients.of(info.url, key=info.secret),
            self._members_changed,
        )
        self.chooser = Chooser(
            self.membership,
            policy_for(config.routing.policy),
            max_local_prefill_tokens=config.local_prefill_tokens,
        )
        transfer = transfer_for(transport)
        self.kv_paths = KvPaths()
        self.warmer = PairWarmer(self.membership, self.metrics, self.background, transfer, self.kv_paths)
        self.handoff = Handoff(
            model_id=model_id,
            config=config,
            membership=self.membership,
            chooser=self.chooser,
            metrics=self.metrics,
            background=self.background,
            transfer=transfer,
            ledger=self.ledger,
            max_model_len=max_model_len,
        )
        self.feed = LedgerFeed(
            self.ledger,
            self.membership,
            self.metrics,
            self.background,
            self.handoff.settle,
            connect_timeout_s=config.connect_timeout_s,
            foreign=self.foreign,
            reader=uuid.uuid4().hex[:12],
            carrying=lambda: self.in_flight.num > 0,
        )
        self.watch = Watch(
            self.membership,
            self.metrics,
            self.background,
            interval_s=config.watch_interval_s,
            probation_s=config.probation_s,
        )
        self.admin_key = AdminKey(config.admin.key_file)
        self.admin = Admin(self.membership, scaler, self.ledger, self.foreign)
        self.answering = Answering(
            handoff=self.handoff,
            resumer=Resumer(self.handoff, renderer, self.metrics, config),
            shadow=self._shadow(),
            in_flight=self.in_flight,
            metrics=self.metrics,
            config=config,
            echo_request_id=echo_request_id,
        )
        self._loops: list[asyncio.Task[None]] = []
        self.metrics.on_render(self._refresh_gauges)

    def _shadow(self) -> Shadow | None:
        if self.config.shadow_check_every is None:
            return None
        return Shadow(
            self.config.shadow_check_every,
            model_id=self.model_id,
            config=self.config,
            membership=self.membership,
            chooser=self.chooser,
            metrics=self.metrics,
            background=self.background,
            paths=self.kv_paths,
            ledger=self.ledger,
            in_flight=self.in_flight,
        )

    def start(self) -> None:
        self._loops = [
            self.background.forever(self._sweep()),
            self.background.forever(self.feed.sweep()),
        ]
        if self.api_keys is not None:
            self._loops.append(self.background.forever(self.api_keys.watch()))

    async def close(self) -> None:
        """Stop the loops, finish what gives KV back, close the connections."""
        for loop in self._loops:
            loop.cancel()
        await self.background.close(_CLOSE_TIMEOUT_S)
        self.clients.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.clients.sweep(asyncio.get_running_loop().time())

    def _members_changed(self) -> None:
        self.warmer.start_missing()
        self.feed.members_changed()
        self.watch.members_changed()

    def _refresh_gauges(self) -> None:
        for pool in POOLS:
            states = [self.membership.standing(member).state for member in self.membership.members(pool)]
            routable = sum(1 for state in states if state in SERVING)
            quarantined = states.count("quarantined")
            self.metrics.replicas.labels(pool, "routable").set(routable)
            self.metrics.replicas.labels(pool, "quarantined").set(quarantined)
            self.metrics.replicas.labels(pool, "other").set(len(states) - routable - quarantined)
        self.metrics.in_flight.set(self.in_flight.num)
        self.metrics.warm_pairs.set(self.membership.num_warm_pairs())
        show_paths(self.kv_paths, self.membership, self.metrics)

    def health(self) -> tuple[int, dict[str, Any]]:
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

    def answered(
        self, request: Request, endpoint: Endpoint, body: dict[str, Any], raw: bytes, store: Store | None
    ) -> Response:
        """The response that runs one completion request. `body` and `raw` hold nothing that only the gateway reads."""
        self._check_room()
        request_id = request_id_of(request)
        check_prompts(body, self.config.max_prompts)
        tenant = tenant_of(request.scope)
        check_media_ids(body, tenant)
        raw = salted(body, raw, tenant)

        async def prepare() -> Call:
            with self.metrics.render_seconds.time():
                prompts = await self.renderer.prompts(endpoint, body)
            check_prompt_tokens(prompts, self.config.max_prompt_tokens)
            name = tenant.name if tenant else None
            return Call(endpoint, body, raw, prompts, request_id, forwarded_headers(request), store, name)

        if store is not None:
            self.metrics.stores.labels(store).inc()
        return self.answering.response(prepare, endpoint=endpoint, request_id=request_id)

    async def passed_on(self, request: Request, method: str, path: str, raw: bytes) -> Response:
        """One decode replica's answer to a route that needs no KV."""
        self._check_room()
        with self.in_flight.carried():
            return await self._passed(request, method, path, raw)

    def _check_room(self) -> None:
        """Raises PoolOverloadedError when the gateway carries as many requests as it may.

        Raises NoReplicaError when the decode replicas that are left only finish what they have.
        """
        if self.membership.finishes_only:
            raise NoReplicaError("every decode replica leaves")
        if self.in_flight.num >= self.config.max_num_requests:
            raise PoolOverloadedError(
                f"the gateway carries {self.in_flight.num} requests, its limit (gateway.max_num_requests)"
            )

    async def _passed(self, request: Request, method: str, path: str, raw: bytes) -> Response:
        request_id, tried = request_id_of(request), frozenset[str]()
        while True:
            with self.chooser.reserve(errand(tried)) as reservation:
                if reservation.decision.refusal is not None:
                    raise no_replica(reservation.decision.refusal)
                if len(tried) >= self.config.max_attempts:
                    raise AttemptsExhaustedError(
                        f"the request was lost on {len(tried)} decode replicas, and no more are tried for it "
                        "(gateway.max_attempts)"
                    )
                member = reservation.decode
                try:
                    answer = await member.client.forward(method, path, raw, timeout_s=_PASSED_TIMEOUT_S)
                except ReplicaLostError as exc:
                    logger.warning("request %s was lost on %s: %s", request_id, member.info.replica_id, exc)
                    if exc.unreachable:
                        self.membership.mark_unreachable(member)
                    tried |= {member.info.replica_id}
                    continue
            headers = {"x-request-id": request_id} if self.echo_request_id else {}
            return Response(answer.payload, answer.status, headers, media_type="application/json")


def create_app(gateway: Gateway) -> FastAPI:
    """The HTTP API over one gateway."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gateway.start()
        yield
        await gateway.close()

    app = FastAPI(
        title="disagg gateway",
        version=disagg.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_errors(app, gateway)
    _add_openai(app, gateway)
    _add_operations(app, gateway)

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            keys = {path: key_for(path) for path in schema["paths"]}
            if gateway.api_keys is None:
                keys = {path: key if key == "admin" else None for path, key in keys.items()}
            openapi.secure(schema, keys)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
    return app


def _add_errors(app: FastAPI, gateway: Gateway) -> None:
    def answer(request: Request, error: DisaggError) -> Response:
        status = shape_of(error).status
        headers = {"x-request-id": request_id_of(request)} if gateway.echo_request_id else {}
        if status == 503:
            headers["retry-after"] = str(gateway.config.retry_after_s)
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        gateway.metrics.requests.labels("other", "none", str(status)).inc()
        return error_response(error, headers)

    app.add_middleware(Edge, keys=gateway.api_keys, max_header_bytes=gateway.config.max_header_bytes, refuse=answer)

    @app.exception_handler(DisaggError)
    async def disagg_error(request: Request, error: DisaggError) -> Response:
        return answer(request, error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            return answer(request, NotFoundError(f"Unknown request URL: {where}"))
        if error.status_code == 405:
            response = answer(request, MethodNotAllowedError(f"Not allowed: {where}"))
            if allow := (error.headers or {}).get("Allow"):
                response.headers["allow"] = allow
            return response
        return answer(request, RequestError(str(error.detail)))

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        gateway.metrics.disconnects.labels("body").inc()
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        logger.error("unexpected error at %s %s", request.method, request.url.path, exc_info=error)
        return answer(request, DisaggError("internal error of the gateway; its log has the details"))


def _add_openai(app: FastAPI, gateway: Gateway) -> None:
    async def received(request: Request) -> tuple[bytes, dict[str, Any], Store | None]:
        raw = await read_body(request, max_bytes=gateway.config.max_body_bytes, timeout_s=gateway.config.body_timeout_s)
        body = parse_json(request, raw)
        check_fields(body, model_id=gateway.model_id)
        store, raw = take_store(body, raw)
        return raw, body, store

    def operation(schema: dict[str, Any]) -> dict[str, Any]:
        return openapi.operation(openapi.for_model(schema, gateway.model_id))

    refusals = openapi.errors(400, 401, 404, 405, 408, 413, 415, 429, 431, 503)

    @app.post("/v1/chat/completions", openapi_extra=operation(openapi.CHAT), responses=refusals)
    async def chat_completions(request: Request) -> Response:
        raw, body, store = await received(request)
        return gateway.answered(request, "chat", body, raw, store)

    @app.post("/v1/completions", openapi_extra=operation(openapi.COMPLETIONS), responses=refusals)
    async def completions(request: Request) -> Response:
        raw, body, store = await received(request)
        return gateway.answered(request, "completions", body, raw, store)

    @app.post("/tokenize", openapi_extra=operation(openapi.TOKENIZE), responses=refusals)
    async def tokenize(request: Request) -> Response:
        raw, *_ = await received(request)
        return await gateway.passed_on(request, "POST", "/tokenize", raw)

    @app.post("/detokenize", openapi_extra=operation(openapi.DETOKENIZE), responses=refusals)
    async def detokenize(request: Request) -> Response:
        raw, *_ = await received(request)
        return await gateway.passed_on(request, "POST", "/detokenize", raw)

    def card() -> dict[str, Any]:
        return {
            "id": gateway.model_id,
            "object": "model",
            "created": gateway.created,
            "owned_by": "disagg",
            "max_model_len": gateway.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card()]})

    @app.get("/v1/models/{model_id:path}", responses=openapi.errors(404))
    async def model(model_id: str) -> JSONResponse:
        if model_id != gateway.model_id:
            raise ModelNotFoundError(f"The model {model_id!r} does not exist; this server has {gateway.model_id!r}.")
        return JSONResponse(card())


def _add_operations(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health", responses={503: {"description": "No request could be served"}})
    async def health() -> JSONResponse:
        status, body = gateway.health()
        headers = {"retry-after": str(gateway.config.retry_after_s)} if status == 503 else {}
        return JSONResponse(body, status, headers=headers)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/admin/v1/pools", responses=openapi.errors(401, 403))
    async def pools(request: Request) -> JSONResponse:
        gateway.admin_key.check(request)
        return JSONResponse(await gateway.admin.pools())

    @app.get(
        "/admin/v1/handoffs",
        openapi_extra={"parameters": ledger_query.PARAMETERS},
        responses=openapi.errors(400, 401, 403),
    )
    async def handoffs(request: Request) -> JSONResponse:
        gateway.admin_key.check(request)
        return JSONResponse(gateway.admin.handoffs(request.query_params.multi_items()))

    @app.get("/admin/v1/handoffs/{handoff_id}", responses=openapi.errors(401, 403, 404))
    async def handoff(handoff_id: str, request: Request) -> JSONResponse:
        gateway.admin_key.check(request)
        return JSONResponse(gateway.admin.handoff(handoff_id))

    @app.post(
        "/admin/v1/pools/{name}/scale",
        openapi_extra=openapi.operation(openapi.SCALE),
        responses=openapi.errors(400, 401, 403, 404, 409),
        status_code=202,
    )
    async def scale(name: str, request: Request) -> JSONResponse:
        gateway.admin_key.check(request)
        raw = await read_body(request, max_bytes=gateway.config.max_body_bytes, timeout_s=gateway.config.body_timeout_s)
        body = parse_json(request, raw)
        if not body:
            raise InvalidRequestError("num_replicas is missing", param="num_replicas")
        return JSONResponse(await gateway.admin.scale(name, body), 202)
