# SPDX-License-Identifier: Apache-2.0
"""What `disagg serve` does: checks a config file, runs it with `serve run` until Ctrl-C, and leaves nothing behind."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

import httpx

from disagg.advice.check import check_file
from disagg.cli import extras, hub, other_model
from disagg.cli.connection import find_key
from disagg.cli.second_opinion import SecondOpinion
from disagg.cli.starting import Starting
from disagg.cli.supervise import ServeRun, reason
from disagg.config import FileKeysConfig
from disagg.errors import ClientError, ConfigError, PoolError
from disagg.sdk.client import Client
from disagg.sdk.messages import pending

_TAIL = 25
_ASK_EVERY_S = 1.0
"""Between two questions whether it is ready. Each goes through proxy and gateway, and takes time from engines that
start on the same cores."""
_NO_REPLICAS = 503
"""Source: Ray Serve 2.60 `ProxyRouter.ready_for_traffic`, which `/-/healthz` tells."""
_END_S = 30.0
"""What Serve may take to end once its applications are drained."""


def serve(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C. 0 after a clean end, 1 when it cannot start, dies, or leaves something behind."""
    with tempfile.TemporaryDirectory(prefix="disagg-serve-") as directory:
        if args.model is not None:
            args.config = other_model.written(args.config, args.model, Path(directory))
        return _serve(args)


def _serve(args: argparse.Namespace) -> int:
    # What vLLM thinks of values is asked when a replica has not started.
    report = check_file(args.config, ask=None)
    if not report.ok or report.config is None:
        print(report.render(), file=sys.stderr)
        return 1
    if report.config.engine.type == "vllm":
        extras.require("serve", ("vllm",))
        kwargs = report.config.model.engine_kwargs
        token = kwargs.get("hf_token")
        lost = hub.trouble(
            report.config.model.source,
            {**os.environ, **report.environment},
            revision=str(kwargs.get("revision") or "main"),
            token=token if isinstance(token, str) else None,
        )
        if lost is not None:
            raise ConfigError(f"{lost}; or give the directory of a checkpoint", path="args.model.source")
    if report.url is None:
        raise ConfigError("nothing would answer HTTP: remove proxy_location: Disabled", path="proxy_location")
    made: list[str] = []
    if (file := report.config.gateway.admin.key_file) and ensure_key(Path(file)):
        made.append("gateway.admin.key_file")
        _say(f"wrote an admin key to {file}")
    keys = report.config.gateway.api_keys
    if isinstance(keys, FileKeysConfig) and ensure_key(Path(keys.path), name="default"):
        made.append("gateway.api_keys.path")
        _say(f"wrote a first API key to {keys.path}")
    for problem in report.problems:
        # What was missing a moment ago is there now.
        if not problem.path.endswith(tuple(made)):
            _say(f"{problem.severity}: {problem.path}: {problem.message}")

    sizes = {deployment.name: deployment.num_replicas for deployment in report.deployments}
    with _interrupts() as interrupts:
        drain_s = args.drain_s
        if drain_s is None:
            drain_s = max(report.config.prefill.drain_timeout_s, report.config.decode.drain_timeout_s)
        serving = ServeRun(args.config, args.log_file, drain_s=drain_s)
        serving.start()
        _say(f"starting {args.config}; log: {serving.log}")
        started = time.monotonic()
        trouble: str | None = None
        served = False
        opinion = SecondOpinion(args.config)
        try:
            key = find_key(Path(file), {}) if file else None
            trouble = _until_ready(serving, args, report.url, key, sizes, interrupts, opinion)
            if trouble is None and not interrupts:
                served = True
                _say(f"ready after {time.monotonic() - started:.0f} s; Ctrl-C stops it")
                pasted = curl(
                    report.url, report.config.model.id, needs_key=keys is not None, certificate=report.certificate
                )
                if not {"RAY_AUTH_MODE", "RAY_ADDRESS"} & os.environ.keys():
                    # Ray 2.60 then asks for a token of its own, and other shells do not know.
                    _say("Serve's own commands: RAY_AUTH_MODE=token serve status")
                _print(f"{report.url}\n{pasted}")
                trouble = _until_interrupted(serving, args.verbose, interrupts)
        finally:
            before, stopping = len(interrupts), time.monotonic()
            _say("stopping" if trouble is None else f"{trouble}; stopping")
            opinion.end()
            # Who never served has nothing to drain, but engines that may not yet hear of their end.
            patience_s = drain_s + _END_S if served else _END_S
            left = serving.stop(patience_s=patience_s, hurry=lambda: len(interrupts) > before, say=_say)
            for thing in left:
                _say(f"left over: {thing}")
            _say(f"stopped after {time.monotonic() - stopping:.1f} s")
    if trouble is not None:
        raise PoolError(f"{trouble}; log: {serving.log}")
    return 1 if left else 0


def ensure_key(file: Path, *, name: str | None = None) -> bool:
    """Create `file` with a random key, readable by its owner only. Returns False when it exists already.

    `name`: the tenant whose API key it is; without one it is the admin key.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    except OSError as exc:
        raise ConfigError(
            f"cannot create the key file {str(file)!r}: {exc.strerror}",
            path="gateway.admin.key_file" if name is None else "gateway.api_keys.path",
        ) from exc
    with os.fdopen(descriptor, "w", encoding="ascii") as output:
        output.write(f"{name}:" * (name is not None) + secrets.token_urlsafe(32) + "\n")
    return True


def curl(url: str, model: str, *, needs_key: bool = False, certificate: str | None = None) -> str:
    """A chat request as a shell command, to be pasted as it is, with an API key in `$API_KEY` where one is needed.

    `certificate`: file of the certificate that the server shows. It may be self-signed.
    """
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
    header = "'Content-Type: application/json'"
    if needs_key:
        header += ' -H "Authorization: Bearer $API_KEY"'
    trust = f"--cacert {shlex.quote(certificate)} " if certificate else ""
    return f"curl {trust}{shlex.quote(url + '/v1/chat/completions')} -H {header} -d {shlex.quote(json.dumps(body))}"


def progress(ready: Mapping[str, int], sizes: Mapping[str, int | str]) -> str:
    """How many replicas of each pool are ready, in words."""
    parts = []
    for name in ("prefill", "decode"):
        size = sizes.get(name)
        parts.append(f"{name} {ready.get(name, 0)}{f'/{size}' if size is not None else ''} ready")
    return ", ".join(parts)


def _until_ready(
    serving: ServeRun,
    args: argparse.Namespace,
    url: str,
    key: str | None,
    sizes: Mapping[str, int | str],
    interrupts: list[int],
    opinion: SecondOpinion,
) -> str | None:
    """Blocks until requests are answered (None), an interrupt came (None) or it is hopeless (the reason)."""
    started = time.monotonic()
    starting = Starting(args.max_start_failures)
    tail: deque[str] = deque(maxlen=400)
    shown, shown_at, asked_at = "", 0.0, 0.0
    ready: Mapping[str, int] = {}
    # Its own server, whoever its certificate is for, and through nobody's proxy.
    transport = httpx.HTTPTransport(verify=False)
    with Client(url, key, timeout_s=2.0, transport=transport) as client, httpx.Client(transport=transport) as http:
        while not interrupts:
            _follow(serving, tail, verbose=args.verbose, starting=starting)
            if starting.last is not None:
                opinion.ask()
            hopeless = opinion.found() or starting.hopeless
            elapsed = time.monotonic() - started
            if (code := serving.exit_code()) is not None:
                hopeless = f"serve run ended with code {code}"
            elif elapsed > args.start_timeout_s:
                hopeless = f"not ready after {elapsed:.0f} s ({progress(ready, sizes)})"
            if hopeless:
                _follow(serving, tail, verbose=args.verbose, starting=starting)
                if starting.told:
                    return hopeless
                if not args.verbose:
                    _say("\n".join(list(tail)[-_TAIL:]))
                why = reason(list(tail))
                return f"{hopeless}: {why}" if why else hopeless
            if time.monotonic() - asked_at >= _ASK_EVERY_S:
                asked_at = time.monotonic()
                try:
                    health = client.health() if _is_routed(http, url) else None
                    if health is not None and health.ok:
                        return None
                    ready = most_ready(ready, health.pools, starting) if health is not None else ready
                    # A replica that has just failed is about to give its place back.
                    for pool in client.pools() if health is not None and key and starting.last is None else ():
                        if not pool.num_unplaced:
                            continue
                        # Serve itself warns of it after half a minute.
                        starting.no_room(pool.name)
                        if words := starting.once(f"{pool.name}: {', '.join(pending(pool))}"):
                            _say(words)
                except ClientError:
                    pass  # nobody answers yet, or not just now: what was last heard stands
            line = progress(ready, sizes)
            if line != shown or time.monotonic() - shown_at >= 10:
                shown, shown_at = line, time.monotonic()
                _say(f"starting: {line} ({elapsed:.0f} s)")
            serving.sample()
            time.sleep(0.1)
    return None


def _is_routed(http: httpx.Client, url: str) -> bool:
    """Whether Serve's proxy has a gateway. Before, it keeps questions, and the first gateway logs them as `GET /`."""
    try:
        return http.get(urljoin(url, "/-/healthz"), timeout=2.0).status_code != _NO_REPLICAS
    except httpx.HTTPError:
        return False


def most_ready(before: Mapping[str, int], now: Mapping[str, int], starting: Starting) -> Mapping[str, int]:
    """What to show as ready. A replica that is up may be too busy for a moment to be routed to, while others start; it
    counts until one has failed. Pure."""
    if starting.last is not None:
        return now
    return {name: max(number, before.get(name, 0)) for name, number in now.items()}


def _until_interrupted(serving: ServeRun, verbose: bool, interrupts: list[int]) -> str | None:
    tail: deque[str] = deque(maxlen=_TAIL)
    while not interrupts:
        _follow(serving, tail, verbose=verbose)
        if (code := serving.exit_code()) is not None:
            if not verbose:
                _say("\n".join(tail))
            return f"serve run ended with code {code}"
        serving.sample()
        time.sleep(0.2)
    return None


def _follow(serving: ServeRun, tail: deque[str], *, verbose: bool, starting: Starting | None = None) -> None:
    """Keep the new log lines, and say what they tell of a start that goes wrong."""
    for line in serving.new_lines():
        tail.append(line)
        if verbose:
            _print(line)
        if starting is not None and (words := starting.feed(line)) is not None:
            _say(words)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP instead of acting on them."""
    seen: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    # `nohup` means that the end of a terminal is none of the server's business.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda got, _frame: seen.append(got)) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    """For a person, to stderr. Whoever reads it may leave: what runs is served, and ended, all the same."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # a terminal or a pipe that is gone
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # as long as the process


def _print(text: str) -> None:
    """The same for stdout."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
