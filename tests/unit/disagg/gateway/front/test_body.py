# SPDX-License-Identifier: Apache-2.0
"""From bytes to a JSON object, without a socket."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import random
import zlib
from collections.abc import Sequence
from typing import Any

import hypothesis
import msgspec
import pytest
from hypothesis import strategies
from starlette.requests import ClientDisconnect, Request

from disagg.config import GatewayConfig
from disagg.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from disagg.gateway.front import body as module
from disagg.gateway.front.body import (
    LONG_NUMBER,
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_FRACTIONS,
    MAX_KEYS,
    MAX_LONG_DIGITS,
    Bodies,
    check_shape,
    long_digits,
    outside_strings,
    parse_object,
)
from pools.errors import PoolOverloadedError

WAITS = b" "
"""A part of a body after which more is to come, and does not."""


def request(headers: dict[str, str] | None = None, parts: Sequence[bytes | None] = ()) -> Request:
    """A request whose body comes in `parts`; None is a client that leaves. After them nothing comes."""
    waiting = list(parts)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.Event().wait()
        part = waiting.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(waiting) or part is WAITS}

    raw = [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def bodies(**settings: Any) -> Bodies:
    defaults = {"max_body_bytes": 10, "body_timeout_s": 0.02, "max_incoming_bytes": 100}
    return Bodies(GatewayConfig(**{**defaults, **settings}))


async def read(reads: Bodies, given: Request) -> tuple[bytes, dict[str, Any]]:
    """The body, which does not count any more."""
    with reads.held() as held:
        return await reads.json_object(given, held)


def large(**settings: Any) -> Bodies:
    return bodies(max_body_bytes=2**24, max_incoming_bytes=2**26, **settings)


async def test_body_in_parts() -> None:
    """Parts are joined up to the limit itself."""
    assert await read(bodies(), request(parts=[b'{"a":', b"", b" 12}"])) == (b'{"a": 12}', {"a": 12})
    assert (await read(bodies(), request(parts=[b'{"a": 123}'])))[1] == {"a": 123}


async def test_body_too_large() -> None:
    """Both a declared and a real size over the limit are refused; a wrong declaration does not help."""
    for given in (
        request({"content-length": "11"}),
        request(parts=[b"abcdef", b"ghijkl"]),
        request({"content-length": "1"}, [b"x" * 11]),
        request({"content-length": "eleven"}, [b"x" * 11]),
        request({"content-length": "-1"}, [b"x" * 11]),
    ):
        with pytest.raises(BodyTooLargeError, match="10 bytes"):
            await read(bodies(), given)


async def test_body_that_does_not_come() -> None:
    """A silent client is refused after the limit, one that leaves is told apart."""
    with pytest.raises(RequestTimeoutError, match=r"0\.02 s"):
        await read(bodies(), request(parts=[WAITS]))
    with pytest.raises(ClientDisconnect):
        await read(bodies(), request(parts=[WAITS, None]))


async def test_bodies_on_their_way_have_a_budget() -> None:
    """Together; what has arrived, was refused or went away gives its bytes back."""
    reads = bodies(max_incoming_bytes=20, body_timeout_s=5)
    waiting = [asyncio.create_task(read(reads, request(parts=[WAITS * 8, WAITS]))) for _ in range(2)]
    while reads.num_bytes < 18:
        await asyncio.sleep(0)
    with pytest.raises(PoolOverloadedError, match="20 bytes.*gateway.max_incoming_bytes"):
        await read(reads, request(parts=[b'{"a":1}']))
    assert await read(reads, request(parts=[b"{}"])) == (b"{}", {})
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    assert reads.num_bytes == 9
    assert (await read(reads, request(parts=[b'{"a":1}'])))[1] == {"a": 1}
    waiting[1].cancel()
    await asyncio.wait(waiting)
    for given in (request(parts=[b"{"]), request(parts=[None]), request(parts=[b"x" * 11])):
        with pytest.raises((InvalidRequestError, BodyTooLargeError, ClientDisconnect)):
            await read(reads, given)
    assert reads.num_bytes == 0


async def test_a_body_counts_until_it_is_released() -> None:
    """As long as it is uncompressed, once; also when whoever has it forgets to release it."""
    reads = large()
    packed = gzip.compress(GIVEN)
    for _ in range(2):
        held = reads.held()
        await reads.json_object(request({"content-encoding": "gzip"}, [packed]), held)
        assert reads.num_bytes == held.num_bytes == len(GIVEN)
        held.release()
        held.release()
        assert reads.num_bytes == 0
    held = reads.held()
    await reads.json_object(request(parts=[b'{"a":1}']), held)
    assert reads.num_bytes == 7
    del held
    assert reads.num_bytes == 0


@pytest.mark.parametrize(
    "content_type",
    [None, "", "application/json", "application/json;charset=utf-8", "APPLICATION/JSON", "application/problem+json"],
)
async def test_json_types(content_type: str | None) -> None:
    """JSON under any of its names, or under none."""
    headers = {} if content_type is None else {"content-type": content_type}
    assert (await read(bodies(), request(headers, [b'{"a": 1}'])))[1] == {"a": 1}


@pytest.mark.parametrize("content_type", ["text/plain", "text/json", "application/jsonp", "; charset=utf-8", "json"])
async def test_other_types(content_type: str) -> None:
    """Anything else is told so."""
    with pytest.raises(UnsupportedMediaTypeError, match="send application/json"):
        await read(bodies(), request({"content-type": content_type}, [b"{}"]))


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"{} {}",
        b'{"a": NaN}',
        b"\xff{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'"\\',
    ],
    ids=["open", "list", "null", "number", "text", "two", "NaN", "no UTF-8", "deep list", "deep object", "open text"],
)
async def test_no_json_object(raw: bytes) -> None:
    """Whatever is no JSON object is the client's fault."""
    with pytest.raises(InvalidRequestError):
        await read(large(), request(parts=[raw]))


GIVEN = json.dumps({"prompt": "hello " * 30_000}).encode()


@pytest.mark.parametrize(
    ("encoding", "sent"),
    [
        ("gzip", gzip.compress(GIVEN)),
        ("X-GZIP", gzip.compress(GIVEN)),
        ("deflate", zlib.compress(GIVEN)),
        ("identity", GIVEN),
        ("", GIVEN),
    ],
)
async def test_compressed_bodies(encoding: str, sent: bytes) -> None:
    """The body is what was compressed; its declared length is that of what is sent."""
    reads = large()
    headers = {"content-encoding": encoding, "content-length": str(len(sent))}
    assert (await read(reads, request(headers, [sent])))[0] == GIVEN
    assert reads.num_bytes == 0


async def test_bad_compression() -> None:
    """One that is not known, not what it says, cut, followed by something, or larger than a body may be."""
    packed = gzip.compress(GIVEN)
    for encoding in ("br", "zstd", "gzip, gzip", "compress"):
        with pytest.raises(UnsupportedMediaTypeError, match="gzip"):
            await read(large(), request({"content-encoding": encoding}, [packed]))
    for sent in (GIVEN, packed[:-1], packed + b"x", packed + packed, b"", zlib.compress(GIVEN)):
        with pytest.raises(InvalidRequestError):
            await read(large(), request({"content-encoding": "gzip"}, [sent]))
    reads = bodies(max_body_bytes=2**16, max_incoming_bytes=2**20)
    with pytest.raises(BodyTooLargeError, match="65536 bytes"):
        await read(reads, request({"content-encoding": "gzip"}, [gzip.compress(b" " * 2**24)]))
    reads = bodies(max_body_bytes=2**16, max_incoming_bytes=2**17)
    reads.num_bytes = 2**17 - 2**15
    with pytest.raises(PoolOverloadedError):
        await read(reads, request({"content-encoding": "gzip"}, [gzip.compress(b" " * 2**16)]))


@pytest.mark.parametrize("size", [1, 2**16 - 1, 2**16, 2**16 + 1, 2**18])
async def test_compressed_input_comes_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """zlib gets a bounded piece at a time: blocks without output cost time, too. What follows the stream is found."""
    inputs: list[int] = []

    class Unpacking:
        def __init__(self, wbits: int) -> None:
            self.real = zlib_decompressobj(wbits)

        def decompress(self, data: bytes, max_length: int) -> bytes:
            inputs.append(len(data))
            return self.real.decompress(data, max_length)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    zlib_decompressobj = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", Unpacking)
    given = json.dumps({"a": random.Random(size).randbytes(size).hex()}).encode()
    packed = zlib.compress(given, 0)
    headers = {"content-encoding": "deflate"}
    assert (await read(large(), request(headers, [packed])))[0] == given
    assert max(inputs) <= 2**16
    for rest in (b"x", b"x" * 2**16, packed):
        with pytest.raises(InvalidRequestError, match="one whole deflate stream"):
            await read(large(), request(headers, [packed + rest]))


async def test_a_body_that_a_server_in_front_lost() -> None:
    """An empty or cut body is called so, and a client that offers to upgrade hears what to change."""
    with pytest.raises(InvalidRequestError, match=r"^the request body is empty$"):
        await read(bodies(), request({"content-length": "0"}, [b""]))
    with pytest.raises(InvalidRequestError, match="only 2 of the 9 bytes"):
        await read(bodies(), request({"content-length": "9"}, [b"{}"]))
    with pytest.raises(InvalidRequestError, match="only 0 of the 9 bytes .*HTTP_1_1"):
        await read(bodies(), request({"content-length": "9", "upgrade": "h2c"}, [b""]))


def nested(levels: int) -> bytes:
    """A JSON object of so many levels, every second one a list."""
    return b'{"a":[' * (levels // 2) + b'{"a":1}' * (levels % 2) + b"]}" * (levels // 2)


async def test_depth() -> None:
    """Up to the limit a body is encoded again and parsed by anything; beyond it is refused, and brackets in text count
    for nothing."""
    reads = large()
    _, found = await read(reads, request(parts=[nested(MAX_DEPTH)]))
    assert json.loads(msgspec.json.encode(found)) == json.loads(nested(MAX_DEPTH))
    for levels in (MAX_DEPTH + 1, 970, 5000):
        with pytest.raises(InvalidRequestError, match=f"nested {levels} levels deep; this server takes {MAX_DEPTH}"):
            await read(reads, request(parts=[nested(levels)]))
    text = json.dumps({"prompt": '[{"' * 5000 + '\\"' * 5000, "a": [[]] * 300}).encode()
    assert (await read(reads, request(parts=[text])))[1]["a"] == [[]] * 300


async def test_number_of_values() -> None:
    """Token ids, objects and lists have a limit; commas and braces in text count for nothing."""
    await check_shape(b'{"prompt":[' + b"1," * 998 + b"1]}", max_values=1000)
    with pytest.raises(InvalidRequestError, match="more than 1000 values.*gateway.max_json_values"):
        await check_shape(b'{"prompt":[' + b"1," * 1000 + b"1]}", max_values=1000)
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_CONTAINERS} objects"):
        await check_shape(b'{"a":[' + b"[]," * MAX_CONTAINERS + b"1]}", max_values=10**6)
    await check_shape(json.dumps({"prompt": "{a, b}" * 20_000}).encode(), max_values=1000)


async def test_number_of_keys() -> None:
    """Keys of all objects count together, repeated ones, too; colons in text count for nothing."""
    few, many = (
        b"{" + b",".join(b'"%d":[{"a":1}]' % i for i in range(number // 2)) + b"}"
        for number in (MAX_KEYS, MAX_KEYS + 2)
    )
    await check_shape(few, max_values=10**6)
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_KEYS} keys"):
        await check_shape(many, max_values=10**6)
    await check_shape(json.dumps({"prompt": "a: b, " * (MAX_KEYS + 1)}).encode(), max_values=10**6)


@pytest.mark.parametrize("length", [LONG_NUMBER, 4300])
async def test_long_numbers(length: int) -> None:
    """Their digits have a limit; shorter numbers have none, and digits in text count for nothing."""
    number = b"7" * length
    fits = MAX_LONG_DIGITS // length * 9 // 10
    await check_shape(b"[" + b",".join([number] * fits) + b"]", max_values=10**6)
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_LONG_DIGITS} digits in numbers of {LONG_NUMBER}"):
        await check_shape(b"[" + b",".join([number] * (fits * 2)) + b"]", max_values=10**6)
    await check_shape(b'["' + number * (fits * 2) + b'"]', max_values=10**6)
    await check_shape(b"[" + b",".join([b"7" * 19] * 40_000) + b"]", max_values=10**6)


def test_digits_of_long_numbers() -> None:
    """They are counted in whole numbers of that length, where there are more than a few digits."""
    assert long_digits(b"12345678901234567890," * 100) == 100 * LONG_NUMBER
    assert long_digits(b"1234567890123456789," * 100) == 0
    assert long_digits(b"x" * 100_000 + b"1" * 1000) == 0
    assert long_digits(b"") == 0


def test_fractions() -> None:
    """They are read as Python reads them, up to a number of them; what no number can hold is refused."""
    given = b'{"a":[0.1,-0.0,5e-324,1E5,1.7976931348623157e308,9007199254740993.0000001]}'
    read = parse_object(given)["a"]
    assert read == json.loads(given)["a"] and math.copysign(1, read[1]) == -1
    assert len(parse_object(b'{"a":[' + b"5e-324," * (MAX_FRACTIONS - 1) + b"1.5,1]}")["a"]) == MAX_FRACTIONS + 1
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_FRACTIONS} numbers with a fraction"):
        parse_object(b'{"a":[' + b"5e-324," * MAX_FRACTIONS + b"1.5]}")
    with pytest.raises(InvalidRequestError, match="-1e999 is out of range"):
        parse_object(b'{"a":-1e999}')


async def test_brackets_that_close_nothing() -> None:
    """Are no JSON, which is found before they are counted one by one."""
    for raw in (b"[" * 101 + b"]" * 10_000_000, b"]" * 200 + b"[" * 101):
        with pytest.raises(InvalidRequestError, match="closes more objects and lists than it opens"):
            await check_shape(raw, max_values=1000)


VALUES = strategies.recursive(
    strategies.none() | strategies.integers() | strategies.text('ab{}[],:"\\\n\u00e9', max_size=12),
    lambda inner: (
        strategies.lists(inner, max_size=4) | strategies.dictionaries(strategies.text("a{\\"), inner, max_size=4)
    ),
)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@hypothesis.given(VALUES, strategies.integers(1, 9))
def test_what_is_outside_strings(value: Any, piece: int) -> None:
    """However the text is cut into pieces, as many brackets and commas are found as a parser finds."""
    raw = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_BYTES", piece)
        found = b"".join(outside_strings(raw))
    assert found == b"".join(outside_strings(raw))
    assert b'"' not in found and b"\\" not in found
    deepest = level = 0
    for byte in found.decode():
        level += (byte in "{[") - (byte in "}]")
        deepest = max(deepest, level)
    assert (deepest, level) == (depth(value), 0)


@pytest.mark.parametrize(
    "raw", [b'"', b'{"a', b'{"a\\', b'{"a\\"', b'"' * 70_001, b"\\" * 70_001, b'{"a":"' + b"x" * 70_000]
)
def test_text_without_an_end(raw: bytes) -> None:
    """It ends, in a time that goes with its size."""
    assert len(b"".join(outside_strings(raw))) <= len(raw)
