# SPDX-License-Identifier: Apache-2.0
"""From a request's bytes to a JSON object: size, time, compression, and the shape that the rest of the stack can take.

Whatever takes longer than a few milliseconds is done in pieces, and the event loop runs in between: every stream of the
gateway goes through that loop.
"""

from __future__ import annotations

import asyncio
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import msgspec
from starlette.requests import Request

from disagg.config import GatewayConfig
from disagg.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from pools.errors import PoolOverloadedError

MAX_DEPTH = 100
"""Objects and lists inside each other. What one parser of the stack takes another one has to take, too: the body is
encoded again for the legs, parsed by the engine, and validated there. The strictest, pydantic's, takes 200."""
MAX_CONTAINERS = 65_536
"""Objects and lists of one body. Each costs the collector of every process that parses the body."""
MAX_KEYS = 40_000
"""Keys of all objects of one body. The parser makes a text of each, and looks for a place for it in its object."""
MAX_FRACTIONS = 16_384
"""Numbers of one body that have a fraction or an exponent, which cost ten times as much as whole ones."""
LONG_NUMBER = 20
"""Digits from which on a number is long: it fits into no machine word, and costs the square of its length."""
MAX_LONG_DIGITS = 262_144
"""Digits of all long numbers of one body."""
_PIECE_BYTES = 65_536
"""Bytes that are looked at before the event loop runs."""
_ENCODINGS = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
"""Content encodings, and what zlib calls their format."""

_DIGITS = b"0123456789"
_DIGITS_ALIKE = bytes.maketrans(_DIGITS, b"0" * len(_DIGITS))
_LONG_RUN = b"0" * LONG_NUMBER
_FEW = 16
"""A piece in which one byte of so many is a digit, or less, is not searched for long numbers."""

# Possessive quantifiers: a body without an end quote costs one pass, not one from every quote.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_WHOLE_STRINGS = re.compile(rb'[^"]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"]*+)*+', re.DOTALL)
_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_BRACKETS = b"{}[]"
_OTHERS = bytes(byte for byte in range(256) if byte not in _BRACKETS)
_STEP = [{b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(bytes([byte]), 0) for byte in range(256)]


@dataclass
class Bodies:
    """Reads the bodies of one gateway replica's requests. Belongs to the gateway's loop."""

    config: GatewayConfig
    num_bytes: int = 0
    """Bytes of bodies that are on their way in, and not sent on yet."""

    def held(self) -> Held:
        """Room for one more body, whose bytes count until it is released."""
        return Held(self)

    async def json_object(self, request: Request, held: Held) -> tuple[bytes, dict[str, Any]]:
        """The whole body, uncompressed, and what it says. Its bytes are added to `held`.

        Raises:
            RequestError: it is too large, too slow, no JSON object, or one that the rest of the stack cannot take.
            PoolOverloadedError: bodies that are on their way in have used up `gateway.max_incoming_bytes`.
            ClientDisconnect: the client left.
        """
        check_content_type(request)
        raw = await self._read(request, held)
        raw = await uncompressed(request, raw, max_bytes=self.config.max_body_bytes, held=held)
        check_whole(request, raw)
        await check_shape(raw, max_values=self.config.max_json_values)
        held.keep(len(raw))
        body = parse_object(raw)
        if len(raw) > _PIECE_BYTES:
            # The checks of what it says take their time, too.
            await asyncio.sleep(0)
        return raw, body

    async def _read(self, request: Request, held: Held) -> bytes:
        max_bytes = self.config.max_body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > max_bytes:
            raise _too_large(max_bytes)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > max_bytes:
                        raise _too_large(max_bytes)
                    held.add(len(chunk))
                    chunks.append(chunk)
        except TimeoutError as exc:
            raise RequestTimeoutError(
                f"the request body did not arrive within {self.config.body_timeout_s:g} s"
            ) from exc
        return b"".join(chunks)


@dataclass
class Held:
    """The bytes of one body, which count until they are released, or nobody has them any more."""

    bodies: Bodies
    num_bytes: int = 0

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()

    def keep(self, num_bytes: int) -> None:
        """Release all but so many."""
        self.bodies.num_bytes -= self.num_bytes - num_bytes
        self.num_bytes = num_bytes

    def release(self) -> None:
        """They do not count any more. May be called again."""
        self.keep(0)

    def add(self, num_bytes: int) -> None:
        """Raises PoolOverloadedError when there is no room for so many more."""
        limit = self.bodies.config.max_incoming_bytes
        if self.bodies.num_bytes + num_bytes > limit:
            raise PoolOverloadedError(
                f"the bodies of requests on their way in have {limit} bytes, the limit of this server "
                "(gateway.max_incoming_bytes)"
            )
        self.bodies.num_bytes += num_bytes
        self.num_bytes += num_bytes


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request body is larger than {max_bytes} bytes, the limit of this server")


def check_content_type(request: Request) -> None:
    """Raises UnsupportedMediaTypeError unless the body is JSON, as it is or compressed in a way that is known here."""
    given = request.headers.get("content-type", "").strip()
    media_type = given.partition(";")[0].strip().lower()
    if given and media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(f"content type {given[:100]!r} is not supported; send application/json")
    encoding = _encoding_of(request)
    if encoding is not None and encoding not in _ENCODINGS:
        raise UnsupportedMediaTypeError(
            f"content encoding {encoding[:100]!r} is not supported; send the body as it is, or one of "
            f"{', '.join(_ENCODINGS)}"
        )


def _encoding_of(request: Request) -> str | None:
    given = request.headers.get("content-encoding", "").strip().lower()
    return given if given not in ("", "identity") else None


async def uncompressed(request: Request, raw: bytes, *, max_bytes: int, held: Held) -> bytes:
    """The body without its content encoding. Raises BodyTooLargeError, InvalidRequestError or PoolOverloadedError."""
    encoding = _encoding_of(request)
    if encoding is None:
        return raw
    unpacking = zlib.decompressobj(_ENCODINGS[encoding])
    pieces: list[bytes] = []
    size = position = 0
    left = b""
    try:
        # The input comes in pieces, too: a stream of empty blocks is long and has no output.
        while not unpacking.eof and (left or position < len(raw)):
            if not left:
                left = raw[position : position + _PIECE_BYTES]
                position += len(left)
            piece = unpacking.decompress(left, _PIECE_BYTES)
            left = unpacking.unconsumed_tail
            size += len(piece)
            if size > max_bytes:
                raise _too_large(max_bytes)
            held.add(len(piece))
            pieces.append(piece)
            await asyncio.sleep(0)
        pieces.append(unpacking.flush())
    except zlib.error as exc:
        raise InvalidRequestError(f"the request body is not {encoding}, as content-encoding says: {exc}") from exc
    if not unpacking.eof or unpacking.unused_data or position < len(raw):
        raise InvalidRequestError(f"the request body is not one whole {encoding} stream")
    return b"".join(pieces)


def check_whole(request: Request, raw: bytes) -> None:
    """Raises InvalidRequestError for an empty or cut body, which would else be called bad JSON.

    Servers in front lose bodies. Serve's proxy loses that of a request that offers to upgrade its connection.
    """
    declared = request.headers.get("content-length", "")
    cut = declared.isdigit() and _encoding_of(request) is None and len(raw) < int(declared)
    if not cut and raw:
        return
    what = (
        f"only {len(raw)} of the {declared} bytes of the request body arrived" if cut else "the request body is empty"
    )
    hint = ""
    if request.headers.get("upgrade"):
        hint = (
            "; the server in front lost it, because the client offers to upgrade the connection: use HTTP/1.1 without "
            "`Upgrade` (Java: HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1))"
        )
    raise InvalidRequestError(f"{what}{hint}")


async def check_shape(raw: bytes, *, max_values: int, what: str = "the request body") -> None:
    """Raises InvalidRequestError for a JSON text that is nested too deep, or has too much of what is slow to read.

    Args:
        what: names the text in errors.
    """
    num_containers = num_commas = num_long_digits = 0
    large = len(raw) > _PIECE_BYTES
    for piece in _pieces(raw):
        num_containers += piece.count(b"{") + piece.count(b"[")
        num_commas += piece.count(b",")
        if large:
            num_long_digits += long_digits(piece)
            await asyncio.sleep(0)
    # At most as many, because these bytes also stand in strings. Every key follows a comma or opens an object.
    many_keys = num_commas + num_containers > MAX_KEYS and await _most_keys(raw) > MAX_KEYS
    if num_containers > MAX_DEPTH or num_commas >= max_values or num_long_digits > MAX_LONG_DIGITS or many_keys:
        await _check_exactly(raw, max_values, what)


def _pieces(raw: bytes) -> Iterator[bytes]:
    if len(raw) <= _PIECE_BYTES:
        yield raw
        return
    for start in range(0, len(raw), _PIECE_BYTES):
        yield raw[start : start + _PIECE_BYTES]


async def _most_keys(raw: bytes) -> int:
    """How many keys there are at most: each has two quotes and a colon."""
    num_colons = num_quotes = 0
    for piece in _pieces(raw):
        num_colons += piece.count(b":")
        num_quotes += piece.count(b'"')
        await asyncio.sleep(0)
    return min(num_colons, num_quotes // 2)


def long_digits(piece: bytes) -> int:
    """About how many digits stand in runs of `LONG_NUMBER` and more; 0 where few bytes are digits."""
    sample = piece[::LONG_NUMBER]
    if len(sample) - len(sample.translate(None, _DIGITS)) <= len(sample) // _FEW:
        return 0
    return LONG_NUMBER * piece.translate(_DIGITS_ALIKE).count(_LONG_RUN)


async def _check_exactly(raw: bytes, max_values: int, what: str) -> None:
    brackets: list[bytes] = []
    num_open = num_closed = num_commas = num_keys = num_long_digits = 0
    for piece in outside_strings(raw):
        found = piece.translate(None, _OTHERS)
        opened = found.count(b"{") + found.count(b"[")
        num_open += opened
        num_closed += len(found) - opened
        num_commas += piece.count(b",")
        num_keys += piece.count(b":")
        num_long_digits += long_digits(piece)
        if num_commas >= max_values:
            raise InvalidRequestError(
                f"{what} has more than {max_values} values, the limit of this server (gateway.max_json_values)"
            )
        for number, limit, of in (
            (num_open, MAX_CONTAINERS, "objects and lists"),
            (num_keys, MAX_KEYS, "keys of objects"),
            (num_long_digits, MAX_LONG_DIGITS, f"digits in numbers of {LONG_NUMBER} digits and more"),
        ):
            if number > limit:
                raise InvalidRequestError(f"{what} has more than {limit} {of}, the limit of this server")
        if num_closed > num_open:
            raise InvalidRequestError(f"{what} is not valid JSON: it closes more objects and lists than it opens")
        brackets.append(found)
        await asyncio.sleep(0)
    depth = max(accumulate(map(_STEP.__getitem__, b"".join(brackets))), default=0)
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"{what} is nested {depth} levels deep; this server takes {MAX_DEPTH}")


def outside_strings(raw: bytes) -> Iterator[bytes]:
    """The bytes of a JSON text without its strings, in pieces of bounded cost. The text may be malformed."""
    position, in_string = 0, False
    while position < len(raw):
        end = min(position + _PIECE_BYTES, len(raw))
        if in_string:
            match = _REST_OF_STRING.match(raw, position, end)
            position = match.end() if match else end
            if position < end:
                in_string = raw[position] != ord('"')
                # At the end quote, or at a backslash whose other half is in the next piece.
                position += 2 if in_string else 1
            yield b""
        else:
            match = _WHOLE_STRINGS.match(raw, position, end)
            stop = match.end() if match else end
            yield _STRING.sub(b"", raw[position:stop])
            in_string = stop < end
            position = stop + in_string


class _Fractions:
    """Reads the numbers of one body that are not whole.

    msgspec 0.22 takes ten times as long as Python for numbers near the smallest one.
    """

    def __init__(self) -> None:
        self._num = 0

    def __call__(self, text: str) -> float:
        """Raises InvalidRequestError for one too many, and for one that is too large."""
        self._num += 1
        if self._num > MAX_FRACTIONS:
            raise InvalidRequestError(
                f"the request body has more than {MAX_FRACTIONS} numbers with a fraction or an exponent, the limit of "
                "this server"
            )
        number = float(text)
        if math.isinf(number):
            raise InvalidRequestError(f"the request body is not valid JSON: the number {text[:40]} is out of range")
        return number


def parse_object(raw: bytes) -> dict[str, Any]:
    """Raises InvalidRequestError."""
    try:
        body = msgspec.json.Decoder(float_hook=_Fractions()).decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequestError(f"the request body is not valid JSON: {exc}") from exc
    if not isinstance(body, dict):
        raise InvalidRequestError("the request body must be a JSON object")
    return body
