# SPDX-License-Identifier: Apache-2.0
"""Validates a Serve config file without starting anything of it, and says what it amounts to.

`check_file` lists every problem at once. `validate_app` is the part that needs `args` only, so that the
application builder refuses the same configs with the same words. Neither imports Ray or vLLM. Only `check_file` asks
vLLM's classes about values, in a process that takes seconds: the builder would keep Serve's controller waiting, and an
engine refuses the same values when it starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from disagg.advice import serve_file
from disagg.advice.certificates import CERTIFICATE, serves_tls
from disagg.advice.check_keys import check_keys
from disagg.advice.exposure import ACTION, ALLOWED, DEFAULT_HOST, strangers_served
from disagg.advice.fit import check_engine_kwargs, check_machine, check_model
from disagg.advice.fit_tiers import check_directories, check_gpu_node, check_packages, check_tier_layout, check_tiers
from disagg.advice.machine import Machine, is_installed, this_machine
from disagg.advice.paths import resolve
from disagg.advice.problems import Problem, problems_of, shown
from disagg.advice.resolved import Deployment, deployments, render
from disagg.advice.resolved_tiers import Tier, render_tier, tiers
from disagg.advice.values import Ask, ask_vllm, check_values, environment_of, question_of
from disagg.config import AppConfig
from pools.plan.checkpoint import Checkpoint, local_directory, read_checkpoint
from pools.plan.engine_kwargs import known_engine_kwargs
from transport.errors import ConfigError
from transport.tiers import ManagedServerConfig

_WITHOUT_VLLM = "names and values in engine_kwargs, and the packages of the tiers, for vLLM is not installed here"
_HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": "8404", "RAY_SERVE_HAPROXY_METRICS_PORT": "9101"}


@dataclass(frozen=True)
class CheckReport:
    """The outcome of a check."""

    file: str
    problems: tuple[Problem, ...]
    config: AppConfig | None = None
    """The typed `args` with local paths made absolute; None when they are invalid."""
    deployments: tuple[Deployment, ...] = ()
    url: str | None = None
    """Where the application will answer; None when no HTTP proxy runs."""
    certificate: str | None = None
    """File of the certificate that it shows there; None without TLS."""
    tiers: tuple[Tier, ...] = ()
    """Where KV is kept beside the engines' own memory."""
    not_checked: str | None = None
    """What could not be checked here and why, in words."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the file gives to every replica."""

    @property
    def ok(self) -> bool:
        """No errors; there may be warnings."""
        return not any(problem.severity == "error" for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "file": self.file,
            "ok": self.ok,
            "url": self.url,
            "problems": [problem.as_dict() for problem in self.problems],
            "not_checked": self.not_checked,
            "args": self.config.model_dump(mode="json") if self.config else None,
            "deployments": [deployment.as_dict() for deployment in self.deployments],
            "tiers": [tier.as_dict() for tier in self.tiers],
        }

    def render(self, *, plan: bool | None = None) -> str:
        """Plain text for a terminal: what will run, then warnings, and errors last, where the eye is.

        Args:
            plan: whether to show what will run; by default when there is no error.
        """
        lines = []
        if self.ok if plan is None else plan:
            lines += [render(deployment) for deployment in self.deployments]
            lines += [render_tier(tier) for tier in self.tiers]
        lines += [f"not checked: {self.not_checked}"] if self.not_checked else []
        for problem in sorted(self.problems, key=lambda problem: problem.severity == "error"):
            lines.append(f"{problem.severity}: {problem.path + ': ' if problem.path else ''}{problem.message}")
            lines += [f"    allowed: {problem.allowed}"] if problem.allowed else []
            lines += [f"    do: {problem.action}"] if problem.action else []
        errors = sum(problem.severity == "error" for problem in self.problems)
        warnings = len(self.problems) - errors
        lines.append(f"{self.file}: {'ok' if self.ok else 'cannot start'}, {errors} error(s), {warnings} warning(s)")
        return "\n".join(lines)


def check_file(
    path: str | Path,
    *,
    base_dir: Path | None = None,
    machine: Machine | None = None,
    single_host: bool = True,
    update: bool = False,
    require_model: bool = True,
    known_kwargs: Collection[str] | None = None,
    installed: Callable[[str], bool] = is_installed,
    environment: Mapping[str, str] = os.environ,
    ask: Ask | None = ask_vllm,
) -> CheckReport:
    """Check the Serve config file at `path`. Reads files, tries to bind its HTTP port, and asks vLLM about values.

    Args:
        base_dir: where relative model paths start; the working directory by default, as for `serve run`.
        machine: what the host has; measured when absent.
        single_host: all replicas run on this machine, so its cores and memory bound them.
        update: the application runs already, so that its own ports are in use.
        require_model: a model directory that does not exist is an error, else a warning.
        known_kwargs: vLLM's argument names; read from the installed vLLM when absent.
        installed: whether a Python module is there; asked only where vLLM itself is installed.
        environment: the variables in which API keys and the passwords of `password_env` are looked for, beside those
            of the application's `runtime_env`.
        ask: asks vLLM about the values of `engine_kwargs`, where it is installed; it takes seconds. None leaves them
            unjudged, and the report does not speak of them.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        return CheckReport(str(path), (Problem("", f"cannot read {str(path)!r}: {reason}", action="give a YAML file"),))
    data, trouble = serve_file.parse(text)
    if trouble:
        return CheckReport(str(path), (trouble,))
    problems = serve_file.check_serve(data)
    if not isinstance(data, dict):
        return CheckReport(str(path), tuple(problems))
    machine = machine or this_machine()
    url, trouble_with_ports = _check_ports(data, machine)
    problems += () if update else trouble_with_ports
    application = _first_application(data)
    if "args" not in application:
        return CheckReport(str(path), tuple(problems), url=url)

    prefix = "applications[0].args"
    config, invalid = parse_args(application["args"], prefix=prefix)
    if config is None:
        return CheckReport(str(path), (*problems, *invalid), url=url)
    base_dir = base_dir or Path.cwd()
    config = resolve(config, base_dir)
    environment = {**environment, **serve_file.application_env(application)}
    if known_kwargs is None:
        known_kwargs = known_engine_kwargs()
    problems += validate_app(
        config,
        prefix=prefix,
        require_model=require_model,
        known_kwargs=known_kwargs,
        installed=installed,
        environment=environment,
    )
    unjudged: list[str] = []
    if known_kwargs is not None and ask is not None and config.engine.type == "vllm":
        wrong_values, unjudged = _ask(config, ask, problems, prefix, serve_file.application_env(application))
        problems += wrong_values
    problems += _check_drain(config, data, application)
    problems += _check_strangers(config, data, prefix)
    sizes = serve_file.num_replicas(application)
    if single_host:
        problems += validate_machine(config, sizes, machine, prefix=prefix)
        problems += () if update else _check_server_ports(config, machine, prefix)
    planned: tuple[Deployment, ...] = ()
    if not any(problem.severity == "error" and "parallel_size" in problem.path for problem in problems):
        planned = deployments(config, serve_file.deployment_overrides(application))
    kept = tiers(config, sizes, _checkpoint(config)) if planned else ()
    if known_kwargs is None and config.engine.type == "vllm":
        unjudged.append(_WITHOUT_VLLM)
    http = data.get("http_options")
    return CheckReport(
        str(path),
        # What the model's arguments get wrong is found once for each pool.
        tuple(dict.fromkeys(problems)),
        config,
        planned,
        url,
        http[CERTIFICATE] if isinstance(http, dict) and serves_tls(http) else None,
        kept,
        "; ".join(unjudged) or None,
        serve_file.application_env(application),
    )


def parse_args(args: object, *, prefix: str = "args") -> tuple[AppConfig | None, list[Problem]]:
    """`args` as an AppConfig, or None and everything that is wrong with it."""
    if not isinstance(args, dict):
        return None, [Problem(prefix, f"expected a mapping, not {shown(args)}", ", ".join(AppConfig.model_fields))]
    if binary := list(_binary(args, prefix)):
        return None, [Problem(path, "is binary data (!!binary)", "text", "change it") for path in binary]
    try:
        return AppConfig.model_validate(args), []
    except ValidationError as exc:
        return None, problems_of(exc, AppConfig, args, prefix)


def _binary(value: object, path: str) -> Iterator[str]:
    """Paths of what YAML makes bytes of. No setting takes them, and JSON cannot hold them."""
    if isinstance(value, bytes):
        yield path
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from [path] if isinstance(key, bytes) else _binary(inner, f"{path}.{key}")
    for index, inner in enumerate(value) if isinstance(value, list) else ():
        yield from _binary(inner, f"{path}[{index}]")


def validate_app(
    config: AppConfig,
    *,
    prefix: str = "args",
    require_model: bool = True,
    known_kwargs: Collection[str] | None = None,
    installed: Callable[[str], bool] = is_installed,
    environment: Mapping[str, str] = os.environ,
) -> list[Problem]:
    """Problems that `args` alone show: model files, vLLM's argument names, packages, sizes that cannot work.

    Reads the model's `config.json` and vLLM's source; relative paths start at the working directory, so
    `resolve` first. Replica counts, ports and this machine are left to `check_file`. A fake engine keeps KV only in
    name, so nothing is asked of its tiers. Packages are looked for where vLLM is installed: elsewhere no replica runs.
    """
    problems = _check_key_file(config, prefix) + check_keys(config, environment, prefix)
    if config.engine.type == "fake":
        return problems
    if known_kwargs is None:
        known_kwargs = known_engine_kwargs()
    if known_kwargs is not None:
        problems += check_packages(config, installed, prefix)
    wrong_kwargs = check_engine_kwargs(config, known_kwargs, prefix)
    if not any(problem.severity == "error" for problem in wrong_kwargs):
        wrong_kwargs = [*wrong_kwargs, *check_tiers(config, environment, prefix)]
    problems += wrong_kwargs
    directory = local_directory(config.model.source, Path.cwd())
    if directory is None:
        return problems
    try:
        checkpoint = read_checkpoint(directory)
    except ConfigError as exc:
        action = "check the path, or give a Hugging Face id; `disagg tiny-model DIR` writes a small model"
        severity: Literal["error", "warning"] = "error" if require_model else "warning"
        problems.append(Problem(f"{prefix}.model.source", str(exc), "a model directory", action, severity))
        return problems
    if not any(problem.severity == "error" for problem in wrong_kwargs):
        problems += check_model(config, checkpoint, prefix, environment)
        problems += check_tier_layout(config, checkpoint, prefix)
    return problems


def validate_machine(
    config: AppConfig, sizes: Mapping[str, int], machine: Machine, *, prefix: str = "args"
) -> list[Problem]:
    """Problems of running all replicas on one machine: its cores, memory and directories. Nothing about GPUs.

    A config for GPUs is compared only with a machine that has GPUs: another machine only checks the config.

    Args:
        sizes: number of replicas of `gateway`, `prefill` and `decode`.
    """
    if config.engine.type == "fake" or (config.platform == "cuda" and not machine.num_gpus):
        return []
    problems = check_directories(config, machine.directory_trouble, prefix)
    try:
        if config.platform == "cuda":
            return [*problems, *check_gpu_node(config, sizes, machine, prefix)]
        return [*problems, *check_machine(config, sizes, machine, _checkpoint(config), prefix)]
    except ConfigError:  # an impossible parallel size, which `validate_app` reports
        return problems


def _ask(
    config: AppConfig, ask: Ask, known: Sequence[Problem], prefix: str, environment: Mapping[str, str]
) -> tuple[list[Problem], list[str]]:
    """What vLLM says of the values that are not known to be wrong, and what it could not be asked.

    `environment`: variables that the file gives to every replica.
    """
    wrong = {problem.path for problem in known if problem.severity == "error"}
    question = question_of(config, wrong, prefix)
    if question is None:
        return [], []
    answer = ask(question, {**environment, **environment_of(config)})
    if isinstance(answer, str):
        return [], [f"values in engine_kwargs: {answer}"]
    return check_values(config, answer.verdicts, prefix), list(answer.unjudged)


def _first_application(data: Mapping[str, Any]) -> Mapping[str, Any]:
    applications = data.get("applications")
    first = applications[0] if isinstance(applications, list) and applications else {}
    return first if isinstance(first, dict) else {}


def _check_ports(data: Mapping[str, Any], machine: Machine) -> tuple[str | None, list[Problem]]:
    if data.get("proxy_location") == "Disabled":
        return None, []
    http = data.get("http_options")
    http = http if isinstance(http, dict) else {}
    host, port = http.get("host") or DEFAULT_HOST, http.get("port", 8000)
    if not isinstance(host, str) or not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        return None, []
    wanted = [("http_options.port", host, port)]
    env = serve_file.controller_env(data)
    if serve_file.uses_haproxy(data):
        wanted += [
            (f"controller_options.runtime_env.env_vars.{name}", "0.0.0.0", int(value))
            for name, default in _HAPROXY_PORTS.items()
            if (value := env.get(name, default)).isdecimal()
        ]
    problems = [
        Problem(
            path,
            f"cannot listen on {at}:{number}: {trouble}",
            "a free port",
            "stop what listens there or set another; `disagg check --update` if this application runs already",
        )
        for path, at, number in wanted
        if (trouble := machine.port_trouble(at, number))
    ]
    shown_host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    shown_host = f"[{shown_host}]" if ":" in shown_host else shown_host
    prefix = _first_application(data).get("route_prefix", "/")
    scheme = "https" if serves_tls(http) else "http"
    return f"{scheme}://{shown_host}:{port}{prefix if isinstance(prefix, str) else ''}".rstrip("/"), problems


def _check_strangers(config: AppConfig, data: Mapping[str, Any], prefix: str) -> list[Problem]:
    """A problem when others reach the address and the config neither sets API keys nor allows requests without."""
    http = data.get("http_options")
    host = http.get("host", DEFAULT_HOST) if isinstance(http, dict) else DEFAULT_HOST
    if not isinstance(host, str) or data.get("proxy_location") == "Disabled":
        return []
    trouble = strangers_served(config.gateway, host or DEFAULT_HOST)
    return [Problem(f"{prefix}.gateway.api_keys", f"is not set: {trouble}", ALLOWED, ACTION)] if trouble else []


def _check_server_ports(config: AppConfig, machine: Machine, prefix: str) -> list[Problem]:
    server = config.shared_cache.server if config.shared_cache else None
    if not isinstance(server, ManagedServerConfig) or (config.platform == "cuda" and not machine.num_gpus):
        return []
    action = "stop what listens there, set another, or leave it to the kernel"
    return [
        Problem(
            f"{prefix}.shared_cache.server.{name}", f"cannot listen on port {port}: {trouble}", "a free port", action
        )
        for name, port in (("port", server.port), ("http_port", server.http_port))
        if port is not None and (trouble := machine.port_trouble("0.0.0.0", port))
    ]


def _check_drain(config: AppConfig, data: Mapping[str, Any], application: Mapping[str, Any]) -> list[Problem]:
    """Time limits of Serve and HAProxy that would cut streams before the pools' own limit."""
    problems = []
    limits = {"prefill": config.prefill.drain_timeout_s, "decode": config.decode.drain_timeout_s}
    limits["gateway"] = limits["decode"]  # the gateway's streams are those of decode
    for index, entry in enumerate(application.get("deployments") or []):
        limit = limits.get(entry.get("name", "")) if isinstance(entry, dict) else None
        given = entry.get("graceful_shutdown_timeout_s") if limit is not None else None
        if limit is not None and isinstance(given, int | float) and given < limit:
            path = f"applications[0].deployments[{index}].graceful_shutdown_timeout_s"
            message = f"{given:g} s cuts a drain that may take {limit:g} s"
            problems.append(Problem(path, message, action="remove it", severity="warning"))
    env = serve_file.controller_env(data)
    hard_stop = env.get("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "120")
    if serve_file.uses_haproxy(data) and hard_stop.isdecimal() and int(hard_stop) < limits["decode"]:
        path = "controller_options.runtime_env.env_vars.RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
        message = f"HAProxy cuts open streams {hard_stop} s after any change of replicas"
        allowed = f"above decode.drain_timeout_s ({limits['decode']:g})"
        problems.append(Problem(path, message, allowed, "raise it", severity="warning"))
    return problems


def _check_key_file(config: AppConfig, prefix: str) -> list[Problem]:
    key_file = config.gateway.admin.key_file
    path = f"{prefix}.gateway.admin.key_file"
    if key_file is None:
        message = "is not set, so every /admin request is answered 403"
        action = "name a file that holds a key, to use `disagg status` and `disagg scale`"
        return [Problem(path, message, action=action, severity="warning")]
    try:
        key = Path(key_file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        message = f"cannot read {key_file!r}, so every /admin request is answered 403"
        return [Problem(path, message, action="write a random key into that file", severity="warning")]
    if not key:
        return [Problem(path, f"{key_file!r} is empty", "one line with a key", "write a random key into that file")]
    if not (key.isascii() and key.isprintable()):
        message = f"{key_file!r} holds more than one line of printable ASCII"
        return [Problem(path, message, "one line with a key", "write a random key into that file")]
    return []


def _checkpoint(config: AppConfig) -> Checkpoint | None:
    directory = local_directory(config.model.source, Path.cwd())
    try:
        return read_checkpoint(directory) if directory else None
    except ConfigError:
        return None
