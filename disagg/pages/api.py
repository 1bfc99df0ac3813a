# SPDX-License-Identifier: Apache-2.0
"""docs/api.md: the HTTP API for clients and operators.

Routes, refusals, errors, limits and fields are tables made from the code that keeps them. The text around them is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel

from disagg.config import GatewayConfig
from disagg.errors import (
    AuthenticationError,
    BodyTooLargeError,
    ConflictError,
    ContextLengthError,
    DisaggError,
    HeadersTooLargeError,
    InvalidRequestError,
    MethodNotAllowedError,
    ModelNotFoundError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    StreamLimitError,
    UnsupportedMediaTypeError,
)
from disagg.gateway.front.body import (
    LONG_NUMBER,
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_FRACTIONS,
    MAX_KEYS,
    MAX_LONG_DIGITS,
    check_content_type,
    check_whole,
    parse_object,
)
from disagg.gateway.front.edge import KeyKind, Route
from disagg.gateway.front.fields import FORBIDDEN_FIELDS, STORE_FIELD
from disagg.gateway.front.flags import with_settings
from disagg.gateway.front.intake import check_fields, check_kinds, check_lists, check_parts, check_prompts, take_store
from disagg.gateway.front.responses import error_body, shape_of
from disagg.gateway.front.tenants import FIELD as SALT_FIELD
from disagg.gateway.front.tenants import Tenant, check_media_ids, salted
from disagg.gateway.ledger.query import PARAMETERS
from disagg.gateway.routes import Api, route_table
from disagg.gateway.stream.answering import check_prompt_tokens
from disagg.sdk import types
from pools.client.request_fields import CHAT_ONLY, COMPLETIONS_ONLY, FIELDS, Legs
from pools.errors import AttemptsExhaustedError, NoReplicaError, PoolOverloadedError, ReplicaLostError

MODEL = "tiny"
"""The model of the examples."""

_HEAD = """# API

Written by `python -m disagg.pages.generate` from the gateway's tables. Do not edit it by hand; the text around the
tables is in `disagg/pages/api.py`.

Any OpenAI client works with `base_url` `http://127.0.0.1:8000/v1`: the port is `http_options.port`, and a
`route_prefix` other than `/` stands before every path. `GET /openapi.json` describes all of it for programs, with the
type of every request field.

## Routes
"""

_EVERYWHERE = frozenset((401, 405, 431))
"""Statuses of every route, which the text names."""
_KEYS: Mapping[KeyKind, str] = {"open": "none", "client": "client's", "admin": "admin"}

_AFTER_ROUTES = """\
The client's key is one of `gateway.api_keys`, where there are any; the admin key is another one. Both are sent as
`Authorization: Bearer <key>` ([security](security.md#api-keys)). Every route refuses a missing or wrong key with 401,
and headers that are too large with 431. The last column has what else the gateway refuses with; an engine may answer
with further statuses.

- `HEAD` works wherever `GET` does: the same status and headers, without a body.
- Another method of a known path is answered 405 with `Allow`, an unknown path 404. Both ask for a key first: below
  `/admin/` for the admin key, elsewhere for a client's.
- `OPTIONS` is such another method, but where `gateway.cors` names the asking page: [browsers](#browsers).
- `GET /-/healthz` and `GET /-/routes` are Ray Serve's own. They need no key, and tell that the proxy runs and the name
  of the application. `/health` says whether requests are served: [health](operations.md#health).

Replicas have an HTTP of their own, `/disagg/v1` and vLLM's routes, for gateways only:
[engines' own ports](security.md#engines-own-ports).

### Routes of vLLM that are not served

They are answered 404 as any unknown path: `{"error": {"message": "Unknown request URL: POST /v1/responses", "type":
"invalid_request_error", "param": null, "code": "not_found"}}`.
"""

NOT_SERVED: Mapping[tuple[str, ...], str] = {
    ("/v1/responses", "/v1/responses/{response_id}", "/v1/messages", "/v1/messages/count_tokens", "/cohere/v2/chat"): (
        "`/v1/chat/completions`, `/tokenize`"
    ),
    ("/v1/chat/completions/batch",): "a request for each chat",
    ("/inference/v1/generate", "/v1/chat/completions/render", "/v1/completions/render", "/abort_requests"): (
        "`/v1/completions` with token ids as `prompt` and `return_token_ids`; a client that leaves aborts its request"
    ),
    ("/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"): (
        "none: both pools generate"
    ),
    ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"): "none",
    ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"): "none: an application has one model",
    ("/version", "/load", "/server_info", "/tokenizer_info", "/ping", "/invocations"): (
        "`/health`, `/metrics`, `/openapi.json`"
    ),
    ("/reset_prefix_cache", "/sleep", "/wake_up", "/pause", "/resume", "/start_profile", "/stop_profile"): (
        "none: they act on one engine"
    ),
}
"""Routes of vLLM 0.32 that the gateway does not have, and what there is instead."""

_REQUESTS = f"""## Chats and completions

The body is that of vLLM's OpenAI server: OpenAI's fields and vLLM's own. The gateway reads what it needs, and the
decode engine gets all of it. What vLLM refuses is refused here in vLLM's words. What vLLM does not know has no effect:
`functions`, `best_of`, `metadata`, `store` and the like. Some fields keep a lost stream from
[going on](failures.md#resume).

One field is not vLLM's: `{STORE_FIELD}`, [`"never"` or `"always"`](tiers.md#one-request).

Bodies are JSON; `Content-Encoding` may be `gzip` or `deflate`. Of the headers the gateway reads `Authorization`,
`Content-Type`, `Content-Encoding`, `Content-Length`, `X-Request-Id`, `traceparent` and `tracestate`; no other one
[goes on](security.md#what-a-client-cannot-send-on). `X-Request-Id` names the request in logs, in the ledger and in the
decode engine when it has at most 128 letters, digits, `.`, `_`, `:` and `-`; else these use an id of the gateway's own.
Ray Serve reads `x-request-timeout-seconds`: a request that has no answer after so many seconds is ended, with 408 as
plain text. A stream that has begun then breaks off without a word; `gateway.max_stream_s` ends streams with an event.

### Refused by the gateway

Beside the [limits](#limits) of size and time. Examples with the model `{MODEL}`; messages may change, status, type and
code do not.
"""

_FIELDS_HEAD = """### Fields

Every field of vLLM 0.32's two request models. The second column says which route has it, where it is one only. The
third says what becomes of it when the prompt is handed from prefill to decode:

- **both**: each leg carries it.
- **both, as tokens**: the gateway has used it to make the token ids that both legs carry. Decode gets it, too.
- **decode**: only the decode leg carries it.
- **not handed off**: a request that uses it is computed by one decode replica alone.
- **refused**: no client may send it.
"""

_LEGS: Mapping[Legs, str] = {
    "both": "both",
    "tokens": "both, as tokens",
    "decode": "decode",
    "alone": "not handed off",
    "none": "refused",
}

_ANSWERS = """## Answers

Chats and completions are answered in vLLM's words, whole or as server-sent events. A stream ends with `data: [DONE]`.
One that cannot go on ends with an error event, `data: {"error": {...}}`, and then `[DONE]`; its status was 200 by then.
`usage.prompt_tokens_details.cached_tokens` counts what some engine or tier had before the request: not what prefill has
handed over, not what an earlier try of the request has computed, and of a list not what one prompt has brought for
another. Where a replica was lost, the figure of the first prefill replica that computed the prompt stands. If none told
one, the figure of a replica that no try has reached does, else 0, which may be too little.

Headers that the gateway adds:
"""

_HEADERS: Sequence[tuple[str, str, str]] = (
    (
        "`x-disagg-prefill`",
        "answers of a replica to chats and completions, refusals among them",
        "the replica that computed the prompt, or the first of several; `local` where the one of the next line did",
    ),
    (
        "`x-disagg-decode`",
        "the same",
        "the replica that made the answer; of a stream that went on elsewhere, the first",
    ),
    ("`x-request-id`", "every answer", "the client's, else a new one"),
    ("`retry-after`", "every 429 and 503, an engine's own included", "seconds, `gateway.retry_after_s`"),
    (
        "`x-accel-buffering: no`, `cache-control: no-cache`",
        "streams",
        "for servers in between: nginx holds a stream back without the first",
    ),
    ("`www-authenticate: Bearer`", "401", "which header the key belongs in"),
    ("`allow`", "405", "the methods of the path"),
)
"""Header of an answer, what has it, and its value."""

_ERRORS_HEAD = """## Errors

Every error is OpenAI's object. `param` names the field at fault where there is one.

```json
{"error": {"message": "The model 'other' does not exist; this server has 'tiny'.",
           "type": "invalid_request_error", "param": "model", "code": "model_not_found"}}
```

The gateway's `code` is a word or null. An engine's error has vLLM's `type` (`BadRequestError`) and its status as a
number in `code`. So test the status first, then `code`.
"""

_AFTER_ERRORS = """\
Where vLLM's message names a flag of its command line, the setting of this project follows, for whoever runs the
application:

    FLAGS

What is answered by servers in front has no such body. Serve's proxy and HAProxy answer 404 as plain text while there is
no application at a path, and HAProxy 500 where it reaches no gateway. [Failures](failures.md) says which failure of a
replica comes to which answer.

## Limits

All are settings of [`gateway`](configuration.md#argsgateway), but for lines of fixed numbers.
"""

_ADMIN = """## Admin API

`GET /admin/v1/pools`, `POST /admin/v1/pools/{name}/scale`, `GET /admin/v1/handoffs` and
`GET /admin/v1/handoffs/{handoff_id}` are what the [SDK](sdk.md) and the [commands](cli.md) use. The SDK's types have
the same fields.

### Scaling

```sh
curl -X POST http://127.0.0.1:8000/admin/v1/pools/decode/scale \\
  -H "Authorization: Bearer $(cat .cache/admin-key)" -H 'Content-Type: application/json' -d '{"num_replicas": 2}'
```

The answer is 202 with `name` and `target_num_replicas`: the size that is worked towards. 409 says that the application
does not set `external_scaler_enabled: true`. What scaling does is in [operations](operations.md#scaling).

### Pools

`GET /admin/v1/pools` answers `{"pools": [...]}`, one object a pool. It asks each replica for its load first; what is
not known is null.
"""

_HANDOFFS = """### Hand-offs

`GET /admin/v1/handoffs` answers `totals`, `num_open`, `balanced` and `records`. With several gateway replicas the one
that gets the request answers from its own books. Query parameters:
"""

_CLIENTS = """## Clients

### OpenAI's client

`examples/openai_client.py` and `examples/streaming.py` run as they are. The client sends 408, 409, 429 and 5xx again by
itself, twice unless `max_retries` says otherwise, and waits as `Retry-After` says. Fields that are not OpenAI's go into
`extra_body`. For a certificate of your own see [security](security.md#a-self-signed-certificate).

### Java

The JDK's `HttpClient` asks for HTTP/2 by default: with its first request to an `http://` address it sends `Connection:
Upgrade, HTTP2-Settings` and `Upgrade: h2c`. Serve's own proxy loses the body of such a request, and the gateway answers
400:

    LOST

Build the client with that version. A request that offers no upgrade is not affected, and behind HAProxy the offer is
ignored: the gateway's own port answers as HTTP/1.1.

### Browsers

A web page may ask the gateway when `gateway.cors.allow_origins` names its origin; without `gateway.cors` no page may.
Preflight requests need no key, what follows does. Pages may send any header with `GET`, `HEAD` and `POST`, and read
`x-request-id`, `x-disagg-prefill`, `x-disagg-decode` and `retry-after`. A key in a page is known to all its visitors:
let a server of yours ask in their place.

### Servers in between

Give streams time: no byte comes before the first token, for up to `gateway.first_byte_timeout_s` (600 s). A server that
buffers answers holds tokens back; nginx does not, because of `x-accel-buffering: no`. Bound the time to a whole head
there: Serve's own proxy has [no such limit](ports.md#connections-that-send-nothing).
"""

_TOOLS = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
"""A message of vLLM's. Source: vLLM 0.32 `OnlineRenderer`."""

LIMITS: Sequence[tuple[str | None, str, type[DisaggError]]] = (
    ("max_header_bytes", "bytes of all headers together", HeadersTooLargeError),
    ("max_body_bytes", "bytes of a body, uncompressed", BodyTooLargeError),
    ("max_incoming_bytes", "bytes of all bodies at one gateway replica that are not sent on yet", PoolOverloadedError),
    ("max_json_values", "values of a body: each token id, each part of a chat", InvalidRequestError),
    (None, f"{MAX_CONTAINERS:,} objects and lists of a body, and {MAX_DEPTH} levels of them", InvalidRequestError),
    (None, f"{MAX_KEYS:,} keys of all objects of a body", InvalidRequestError),
    (
        None,
        f"{MAX_FRACTIONS:,} numbers of a body with a fraction or an exponent, and {MAX_LONG_DIGITS:,} digits in "
        f"numbers of {LONG_NUMBER} digits and more",
        InvalidRequestError,
    ),
    ("max_chat_parts", "messages, content parts and tool calls of a chat", InvalidRequestError),
    ("max_tools", "tools of a request", InvalidRequestError),
    (
        "max_field_entries",
        "entries of any other list or object, with those of the lists and objects right in it; token ids are free in "
        "`prompt`, `tokens` and `allowed_token_ids`",
        InvalidRequestError,
    ),
    ("max_prompts", "prompts of a request", InvalidRequestError),
    ("max_prompt_tokens", "tokens of a prompt; unset, what the model takes, which the engine says", ContextLengthError),
    ("body_timeout_s", "seconds to send the body", RequestTimeoutError),
    ("max_num_requests", "requests that one gateway replica carries, from their heads on", PoolOverloadedError),
    ("local_prefill_tokens", "prompt tokens that one decode replica computes at a time", RateLimitError),
    ("max_stream_s", "seconds of a stream from its first byte", StreamLimitError),
    (
        "client_stall_timeout_s",
        "seconds in which a client takes nothing of its stream, behind HAProxy",
        ReplicaLostError,
    ),
)
"""Setting (None where the number is fixed), what it bounds, and the error beyond it."""

_IN_STREAMS: Mapping[type[DisaggError], str] = {
    StreamLimitError: "in a stream",
    ReplicaLostError: "502, or in a stream",
}
"""Errors that a stream ends with by an event, when its status was 200, and where a client meets them."""

ERRORS: Mapping[type[DisaggError], str | None] = {
    InvalidRequestError: None,
    ContextLengthError: None,
    AuthenticationError: None,
    PermissionDeniedError: None,
    ModelNotFoundError: None,
    NotFoundError: "There is no such route, pool or hand-off.",
    MethodNotAllowedError: None,
    RequestTimeoutError: None,
    StreamLimitError: None,
    ConflictError: None,
    BodyTooLargeError: None,
    UnsupportedMediaTypeError: None,
    RateLimitError: "Every replica that could answer computes as many prompt tokens as it may "
    "(`gateway.local_prefill_tokens`, `gateway.prefill_alone_tokens`). Ask again after a few seconds.",
    HeadersTooLargeError: None,
    DisaggError: "A fault of the gateway or of Serve's controller. The gateway's log has more.",
    ReplicaLostError: "The replica that worked on the request was lost, and no other one could go on.",
    NoReplicaError: "No replica that could answer is ready. Ask again after a few seconds.",
    PoolOverloadedError: "The gateway carries as many requests or bytes as it may. Ask again after a few seconds.",
    AttemptsExhaustedError: "The request was lost on as many replicas as one may try (`gateway.max_attempts`). It may "
    "be what breaks them.",
}
"""Every error that a client may meet, and when, where the class's docstring is not for clients."""


async def document() -> Any:
    """This API as an OpenAPI document."""


def routes() -> tuple[Route, ...]:
    """The routes of the gateway. Their handlers belong to no gateway and cannot be called."""
    return route_table(Api.__new__(Api), document).routes


def refusals() -> list[tuple[str, DisaggError]]:
    """What the gateway refuses of a request, in words, and the error that it raises."""
    limits = GatewayConfig()
    tenant = Tenant("alice", "salt")
    forbidden = ", ".join(f"`{name}`" for name in FORBIDDEN_FIELDS)
    first = FORBIDDEN_FIELDS[0]
    asked = {"model": MODEL}
    media = {"messages": [{"role": "user", "content": [{"type": "image_url", "uuid": "a"}]}]}
    cases: Sequence[tuple[str, Callable[[], object]]] = (
        ("a content type other than JSON", lambda: check_content_type(_head("content-type", "text/plain"))),
        ("an unknown content encoding", lambda: check_content_type(_head("content-encoding", "br"))),
        ("an empty body", lambda: check_whole(_head(), b"")),
        ("no JSON", lambda: parse_object(b"{")),
        ("JSON, but no object", lambda: parse_object(b"[]")),
        (f"one of {forbidden}", lambda: check_fields({**asked, first: {}}, model_id=MODEL)),
        (
            "one of them in `vllm_xargs`",
            lambda: check_fields({**asked, "vllm_xargs": {first: 1}}, model_id=MODEL),
        ),
        ("no `model`", lambda: check_fields({}, model_id=MODEL)),
        ("a `model` that is no text", lambda: check_fields({"model": 1}, model_id=MODEL)),
        ("another model", lambda: check_fields({"model": "other"}, model_id=MODEL)),
        ("too many prompts", lambda: check_prompts({"prompt": [""] * (limits.max_prompts + 1)}, limits.max_prompts)),
        ("a message that is no object", lambda: check_kinds({"messages": ["a"]})),
        ("a list that mixes kinds of prompts", lambda: check_prompts({"prompt": [1, "a"]}, limits.max_prompts)),
        (
            "too many entries of another list or object",
            lambda: check_lists({"stop": ["a"] * (limits.max_field_entries + 1)}, limits.max_field_entries),
        ),
        (
            "a chat of too many parts",
            lambda: check_parts(
                {"messages": [{}] * (limits.max_chat_parts + 1)},
                max_parts=limits.max_chat_parts,
                max_tools=limits.max_tools,
            ),
        ),
        (
            "too many tools",
            lambda: check_parts(
                {"tools": [{}] * (limits.max_tools + 1)}, max_parts=limits.max_chat_parts, max_tools=limits.max_tools
            ),
        ),
        ("a prompt above `gateway.max_prompt_tokens`", lambda: check_prompt_tokens([[0] * 9], 8)),
        (f"another `{STORE_FIELD}`", lambda: take_store({STORE_FIELD: "yes"}, b"")),
        (
            f"a `{SALT_FIELD}` that is no text, where each key has caches of its own",
            lambda: salted({SALT_FIELD: 1}, b"{}", tenant),
        ),
        ("a content part with a `uuid`, where each key has caches of its own", lambda: check_media_ids(media, tenant)),
    )
    return [(what, _raised(case)) for what, case in cases]


def page() -> str:
    """The whole page as Markdown."""
    lost = _raised(lambda: check_whole(_head("content-length", "96", "upgrade", "h2c"), b""))
    parts = [
        _HEAD,
        *_table(("route", "key", "answers with", "refuses with"), map(_route, routes())),
        "",
        _AFTER_ROUTES,
        *_table(("route", "instead"), ((_code(paths), instead) for paths, instead in NOT_SERVED.items())),
        "",
        _REQUESTS,
        *_table(("what", "status", "type", "code", "param", "message"), (_refusal(*line) for line in refusals())),
        "",
        _FIELDS_HEAD,
        *_table(("field", "only in", "on", "why"), map(_field, FIELDS)),
        "",
        _ANSWERS,
        *_table(("header", "on", "value"), _HEADERS),
        "",
        _ERRORS_HEAD,
        *_table(("status", "type", "code", "when"), (_error(*line) for line in ERRORS.items())),
        "",
        _AFTER_ERRORS.replace("FLAGS", with_settings(_TOOLS, ("enable_auto_tool_choice", "tool_call_parser"))),
        *_table(("limit", "default", "of", "beyond it"), (_limit(*line) for line in LIMITS)),
        "",
        _ADMIN,
        *_answer(types.Pool),
        "",
        "Each of `replicas`:",
        "",
        *_answer(types.Replica),
        "",
        _HANDOFFS,
        *_table(("parameter", "values", "meaning"), map(_parameter, PARAMETERS)),
        "",
        "Each of `records`:",
        "",
        *_answer(types.HandoffRecord),
        "",
        _CLIENTS.replace("LOST", str(lost)),
    ]
    return "\n".join(parts)


def _head(*headers: str) -> Any:
    """The head of a request, as far as the checks of a body look at it."""
    return SimpleNamespace(headers=dict(zip(headers[::2], headers[1::2], strict=True)))


def _raised(case: Callable[[], object]) -> DisaggError:
    try:
        case()
    except DisaggError as exc:
        return exc
    raise AssertionError("what the page calls refused is let in")


def _route(route: Route) -> tuple[str, ...]:
    assert route.key is not None
    statuses = sorted({int(status) for status in route.document.get("responses", {})} - _EVERYWHERE)
    path = route.path.replace(":path}", "}")
    words = " ".join((route.handler.__doc__ or "").split())
    return f"`{route.method} {path}`", _KEYS[route.key], words, ", ".join(map(str, statuses))


def _refusal(what: str, error: DisaggError) -> tuple[str, ...]:
    told: Any = error_body(error)["error"]
    return (
        what,
        str(shape_of(error).status),
        f"`{told['type']}`",
        _or_null(told["code"]),
        _or_null(told["param"]),
        told["message"],
    )


def _field(name: str) -> tuple[str, ...]:
    only = "chats" if name in CHAT_ONLY else "completions" if name in COMPLETIONS_ONLY else ""
    return f"`{name}`", only, _LEGS[FIELDS[name].legs], FIELDS[name].why


def _error(error: type[DisaggError], words: str | None) -> tuple[str, ...]:
    told: Any = error_body(error(""))["error"]
    when = words or (error.__doc__ or "").split("\n\n")[0]
    status = _IN_STREAMS.get(error) or str(shape_of(error("")).status)
    return status, f"`{told['type']}`", _or_null(told["code"]), " ".join(when.split())


def _limit(name: str | None, what: str, error: type[DisaggError]) -> tuple[str, ...]:
    status = "the stream ends with an error event" if error in _IN_STREAMS else str(shape_of(error("")).status)
    if name is None:
        return "fixed", "", what, status
    default = getattr(GatewayConfig(), name)
    return f"`{name}`", "none" if default is None else f"{default:,.10g}", what, status


def _parameter(parameter: Mapping[str, Any]) -> tuple[str, ...]:
    schema = parameter["schema"]
    values = _code(schema["enum"]) if "enum" in schema else schema["type"]
    if "maximum" in schema:
        values += f", {schema['minimum']} to {schema['maximum']}"
    if "default" in schema:
        values += f"; default `{schema['default']}`"
    return f"`{parameter['name']}`", values, parameter["description"]


def _answer(model: type[BaseModel]) -> list[str]:
    """The fields of an answer as the SDK knows them."""
    told = {name: (field.description or "").replace("None", "null") for name, field in model.model_fields.items()}
    return _table(("field", "meaning"), ((f"`{name}`", words) for name, words in told.items()))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [_line(titles), "|" + "---|" * len(titles)]
    return lines + [_line(row) for row in rows]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _or_null(value: object) -> str:
    return "null" if value is None else f"`{value}`"
