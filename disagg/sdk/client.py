# SPDX-License-Identifier: Apache-2.0
"""`Client` and `AsyncClient`: read and scale the pools of a running application, and read its hand-offs.

They speak the admin API only; any OpenAI client talks to the model. `disagg.sdk.messages` builds their requests and
reads the answers, so the two differ in `await` alone. httpx, pydantic and asyncio load when they are first used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias

from disagg.errors import ClientError
from disagg.sdk import messages

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from disagg.sdk.types import Handoffs, Health, Pool

DEFAULT_URL = "http://127.0.0.1:8000"

OnProgress: TypeAlias = "Callable[[Pool], None]"


class Client:
    """Talks to one application with blocking calls. Close it, or use it in a `with` block; threads may share it.

    Args:
        base_url: address of the gateway.
        api_key: the admin key; needed by everything but `health`.
        timeout_s: seconds one HTTP call may take.
        ca_file: certificates in PEM format that the server's may be signed by, e.g. its own when it is self-signed. By
            default those of `SSL_CERT_FILE`, else the well-known authorities.
        transport: replaces the network, for tests.

    Raises:
        ValueError: `base_url`, `api_key`, `ca_file` or a proxy of the environment cannot be used.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        ca_file: str | Path | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        from disagg.sdk.http import Http

        self._http = Http(base_url, api_key, timeout_s=timeout_s, ca_file=ca_file, transport=transport)
        self.base_url = self._http.base_url

    def health(self) -> Health:
        """Whether requests are served. Needs no key. Raises `ClientError` when nobody answers."""
        return messages.read_health(self._send(messages.get_health()))

    def pools(self) -> list[Pool]:
        """All pools with their replicas."""
        return messages.read_pools(self._send(messages.list_pools()))

    def handoffs(
        self,
        *,
        gateway: str | None = None,
        outcome: str | None = None,
        replica: str | None = None,
        request_id: str | None = None,
        tenant: str | None = None,
        since: float | None = None,
        limit: int | None = None,
    ) -> Handoffs:
        """The books of hand-offs, and the newest records that pass the filter.

        With several gateway replicas the answer is that of the one which got the request.

        Args:
            gateway: `own`, which is the default, or `other`: what that replica heard of all others' hand-offs, such as
                those of a gateway that has died.
            outcome: `open`, `consumed`, `released`, `rescued`, `expired` or `failed`; or `stored` or `reused`.
            replica: id of a replica on either side.
            request_id: id of one request.
            tenant: whose API key the requests came with.
            since: unix seconds; only what was produced at that time or later.
            limit: records at most, 0 to 10,000; the server's own limit is 100.

        Raises:
            APIStatusError: 400 a filter that the server does not know, 401 and 403 key trouble.
        """
        call = messages.list_handoffs(
            gateway=gateway,
            outcome=outcome,
            replica=replica,
            request_id=request_id,
            tenant=tenant,
            since=since,
            limit=limit,
        )
        return messages.read_handoffs(self._send(call), call)

    def pool(self, name: str) -> PoolHandle:
        """Handle of the pool called `name`. Asks the server nothing."""
        return PoolHandle(self, name)

    def close(self) -> None:
        """Closes the connections. Does nothing when called again."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: messages.ApiCall) -> messages.Reply:
        return self._http.send(call)


class PoolHandle:
    """One pool of a `Client`."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self.name = name

    def status(self) -> Pool:
        """The pool as it stands. Raises `APIStatusError` (404) when there is none of this name."""
        return messages.find_pool(self._client.pools(), self.name)

    def scale(self, num_replicas: int) -> ScaleOperation:
        """Set the pool's size, 1 to 1024, and return at once; the operation can be waited for.

        Raises:
            APIStatusError: 404 unknown pool, 409 the application is not set up for it, 401 and 403 key trouble.
        """
        started = time.monotonic()
        call = messages.scale_pool(self.name, num_replicas)
        messages.read_accepted(self._client._send(call), call)
        return ScaleOperation(self, num_replicas, started=started)


class ScaleOperation:
    """A size that a server has accepted and works towards."""

    def __init__(self, pool: PoolHandle, num_replicas: int, *, started: float) -> None:
        self._pool = pool
        self._started = started
        self._finished: float | None = None
        self.num_replicas = num_replicas

    @property
    def elapsed_s(self) -> float:
        """Seconds from the request until the size was reached, or until now."""
        return (self._finished or time.monotonic()) - self._started

    def wait(self, timeout_s: float = 300.0, poll_s: float = 0.5, on_progress: OnProgress | None = None) -> Pool:
        """Block until exactly the wanted replicas exist and all get requests; removed ones are gone by then.

        The wait goes on over connection trouble and the statuses 502, 503 and 504, and over quarantined replicas: the
        application replaces those. `on_progress` is called with every snapshot.

        Raises:
            ScaleTimeoutError: the size was not reached in `timeout_s` seconds. The message says which replicas are
                missing and why. The server goes on trying.
            ClientError: the server refuses to say how the pool stands.
        """
        deadline = time.monotonic() + timeout_s
        pool: Pool | None = None
        while True:
            trouble: ClientError | None = None
            try:
                pool = self._pool.status()
            except ClientError as exc:
                if not messages.is_transient(exc):
                    raise
                trouble = exc
            if pool is not None and trouble is None:
                if on_progress is not None:
                    on_progress(pool)
                if pool.has_size(self.num_replicas):
                    self._finished = time.monotonic()
                    return pool
            left = deadline - time.monotonic()
            if left <= 0:
                raise messages.scale_timeout(
                    self._pool.name, self.num_replicas, elapsed_s=self.elapsed_s, pool=pool, trouble=trouble
                )
            time.sleep(min(poll_s, left))


class AsyncClient:
    """`Client` for asyncio. Belongs to one event loop; close it, or use it in an `async with` block."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        ca_file: str | Path | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        from disagg.sdk.http import AsyncHttp

        self._http = AsyncHttp(base_url, api_key, timeout_s=timeout_s, ca_file=ca_file, transport=transport)
        self.base_url = self._http.base_url

    async def health(self) -> Health:
        """As `Client.health`."""
        return messages.read_health(await self._send(messages.get_health()))

    async def pools(self) -> list[Pool]:
        """As `Client.pools`."""
        return messages.read_pools(await self._send(messages.list_pools()))

    async def handoffs(
        self,
        *,
        gateway: str | None = None,
        outcome: str | None = None,
        replica: str | None = None,
        request_id: str | None = None,
        tenant: str | None = None,
        since: float | None = None,
        limit: int | None = None,
    ) -> Handoffs:
        """As `Client.handoffs`."""
        call = messages.list_handoffs(
            gateway=gateway,
            outcome=outcome,
            replica=replica,
            request_id=request_id,
            tenant=tenant,
            since=since,
            limit=limit,
        )
        return messages.read_handoffs(await self._send(call), call)

    def pool(self, name: str) -> AsyncPoolHandle:
        """As `Client.pool`."""
        return AsyncPoolHandle(self, name)

    async def close(self) -> None:
        """As `Client.close`."""
        await self._http.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: messages.ApiCall) -> messages.Reply:
        return await self._http.send(call)


class AsyncPoolHandle:
    """One pool of an `AsyncClient`."""

    def __init__(self, client: AsyncClient, name: str) -> None:
        self._client = client
        self.name = name

    async def status(self) -> Pool:
        """As `PoolHandle.status`."""
        return messages.find_pool(await self._client.pools(), self.name)

    async def scale(self, num_replicas: int) -> AsyncScaleOperation:
        """As `PoolHandle.scale`."""
        started = time.monotonic()
        call = messages.scale_pool(self.name, num_replicas)
        messages.read_accepted(await self._client._send(call), call)
        return AsyncScaleOperation(self, num_replicas, started=started)


class AsyncScaleOperation:
    """`ScaleOperation` for asyncio. Cancelling the wait leaves the server at work."""

    def __init__(self, pool: AsyncPoolHandle, num_replicas: int, *, started: float) -> None:
        self._pool = pool
        self._started = started
        self._finished: float | None = None
        self.num_replicas = num_replicas

    @property
    def elapsed_s(self) -> float:
        """As `ScaleOperation.elapsed_s`."""
        return (self._finished or time.monotonic()) - self._started

    async def wait(self, timeout_s: float = 300.0, poll_s: float = 0.5, on_progress: OnProgress | None = None) -> Pool:
        """As `ScaleOperation.wait`."""
        import asyncio

        deadline = time.monotonic() + timeout_s
        pool: Pool | None = None
        while True:
            trouble: ClientError | None = None
            try:
                pool = await self._pool.status()
            except ClientError as exc:
                if not messages.is_transient(exc):
                    raise
                trouble = exc
            if pool is not None and trouble is None:
                if on_progress is not None:
                    on_progress(pool)
                if pool.has_size(self.num_replicas):
                    self._finished = time.monotonic()
                    return pool
            left = deadline - time.monotonic()
            if left <= 0:
                raise messages.scale_timeout(
                    self._pool.name, self.num_replicas, elapsed_s=self.elapsed_s, pool=pool, trouble=trouble
                )
            await asyncio.sleep(min(poll_s, left))
