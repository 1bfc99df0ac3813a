# SPDX-License-Identifier: Apache-2.0
"""The gateway without Ray: its parts put together, and the FastAPI app over the route table.

`disagg.gateway.deployment` runs it in Serve; tests run it under plain uvicorn with the same code.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

import disagg
from disagg.config import GatewayConfig
from disagg.errors import MethodNotAllowedError, NotFoundError, RequestError
from disagg.gateway.admin import Admin, Scaler
from disagg.gateway.background import Background
from disagg.gateway.front import openapi
from disagg.gateway.front.admin_key import AdminKey
from disagg.gateway.front.api_keys import keys_of
from disagg.gateway.front.body import Bodies
from disagg.gateway.front.edge import Edge
from disagg.gateway.front.faults import Faults
from disagg.gateway.front.in_flight import InFlight
from disagg.gateway.front.intake import ClientDisconnect, request_id_of
from disagg.gateway.front.render import Renderer
from disagg.gateway.front.responses import error_response, shape_of
from disagg.gateway.handoff.handoff import Handoff
from disagg.gateway.handoff.transfers import transfer_for
from disagg.gateway.handoff.warm import PairWarmer
from disagg.gateway.ledger.feed import LedgerFeed
from disagg.gateway.ledger.foreign import foreign_ledger
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.pauses import watch_pauses
from disagg.gateway.replicas.choosing import Chooser
from disagg.gateway.replicas.kv_paths import KvPaths
from disagg.gateway.replicas.membership import POOLS, Membership
from disagg.gateway.replicas.serving import SERVING
from disagg.gateway.replicas.watch import Watch
from disagg.gateway.routes import Api, Model, route_table
from disagg.gateway.shadow.shadow import Shadow, show_paths
from disagg.gateway.stream.answering import Answering
from disagg.gateway.stream.resuming import Resumer
from disagg.observability.metrics import Metrics
from disagg.routing.policies import policy_for
from pools.client.registry import ReplicaClients
from pools.client.replica import Limits
from transport.descriptor import Transport
from transport.errors import DisaggError

_SWEEP_S = 0.5
_CLOSE_TIMEOUT_S = 10.0
_EXPOSED_HEADERS = ("x-request-id", "x-disagg-prefill", "x-disagg-decode", "retry-after")
"""Headers that a page may read of an answer."""
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
        engine_arguments: Collection[str] = (),
    ) -> None:
        """Blocks on the files of keys. Raises ConfigError when they cannot be read.

        Args:
            echo_request_id: put `x-request-id` on responses; False behind a server that does so itself.
            environment: where API keys are looked for when the configuration names a variable.
            engine_arguments: those that a config may set; refusals of engines that name one as a flag name the setting.
        """
        self.model_id = model_id
        self.renderer = renderer
        self.config = config
        self.echo_request_id = echo_request_id
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
        self.bodies = Bodies(config)
        self.metrics.incoming_bytes.set_function(lambda: self.bodies.num_bytes)
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
            prefill_alone=config.prefill_alone_tokens > 0,
        )
        self.chooser = Chooser(
            self.membership,
            policy_for(config.routing.policy),
            max_local_prefill_tokens=config.local_prefill_tokens,
            max_prefill_alone_tokens=config.prefill_alone_tokens,
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
        answering = Answering(
            renderer=renderer,
            membership=self.membership,
            handoff=self.handoff,
            resumer=Resumer(self.handoff, renderer, self.metrics, config),
            shadow=self._shadow(),
            in_flight=self.in_flight,
            metrics=self.metrics,
            config=config,
            echo_request_id=echo_request_id,
            engine_arguments=engine_arguments,
        )
        self.api = Api(
            model=Model(model_id, int(time.time()), max_model_len),
            config=config,
            bodies=self.bodies,
            membership=self.membership,
            chooser=self.chooser,
            answering=answering,
            admin=Admin(self.membership, scaler, self.ledger, self.foreign),
            metrics=self.metrics,
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
            self.background.forever(watch_pauses(self.metrics)),
        ]
        if self.api_keys is not None:
            self._loops.append(self.background.forever(self.api_keys.watch()))

    async def close(self) -> None:
        """Stop the loops, wait for the tasks that give KV back, close the connections."""
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


def create_app(gateway: Gateway) -> FastAPI:
    """The HTTP API over one gateway. Raises UnstatedRouteError when a route does not say which key it asks for.

    If somebody adds a route to the app that is not in the route table, the start of the app raises the same error.
    """

    async def document() -> Response:
        # The first call makes the document, which takes a while.
        return JSONResponse(await asyncio.to_thread(app.openapi))

    table = route_table(gateway.api, document)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        table.check(app)
        gateway.start()
        yield
        await gateway.close()

    app = FastAPI(
        title="disagg gateway",
        version=disagg.__version__,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    table.add_to(app)
    _add_errors(app, gateway)
    app.add_middleware(
        Edge,
        table=table,
        keys=gateway.api_keys,
        admin_key=gateway.admin_key,
        max_header_bytes=gateway.config.max_header_bytes,
        retry_after_s=gateway.config.retry_after_s,
        refuse=partial(_answer, gateway),
    )
    app.add_middleware(Faults, answer=partial(_answer, gateway))
    if (cors := gateway.config.cors) is not None:
        # In front of the others: a browser sends its preflight request without a key, and reads refusals, too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors.allow_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            allow_credentials=cors.allow_credentials,
            expose_headers=_EXPOSED_HEADERS,
            max_age=cors.max_age_s,
        )

    def key_of(method: str, path: str) -> str | None:
        key = table.key_for(method, path)
        return None if key == "open" or (key == "client" and gateway.api_keys is None) else key

    def openapi_document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            openapi.secure(made, key_of)
            bodies = openapi.request_bodies(gateway.renderer.schemas(), gateway.model_id)
            made.setdefault("components", {}).setdefault("schemas", {}).update(bodies)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi_document  # type: ignore[method-assign]
    return app


def _answer(gateway: Gateway, request: Request, error: DisaggError) -> Response:
    """The response that tells the client of an error."""
    status = shape_of(error).status
    headers = {"x-request-id": request_id_of(request)} if gateway.echo_request_id else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    gateway.metrics.requests.labels("other", "none", str(status)).inc()
    return error_response(error, headers)


def _add_errors(app: FastAPI, gateway: Gateway) -> None:
    answer = partial(_answer, gateway)

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
