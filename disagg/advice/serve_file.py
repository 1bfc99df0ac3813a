# SPDX-License-Identifier: Apache-2.0
"""Reads a Serve config file and checks the part that Ray Serve owns: the keys around `args`.

Serve itself ignores unknown keys, so a typo would pass silently. Ray is not imported.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import yaml

from disagg.advice.certificates import check_certificates
from disagg.advice.problems import Problem, shown, unknown_key

IMPORT_PATH = "disagg.app:build"
DEPLOYMENTS = ("gateway", "prefill", "decode")
MAX_NUM_REPLICAS = 1024

# Source: Ray Serve 2.60 `ServeDeploySchema` and the schemas it holds.
_TOP_KEYS = (
    "proxy_location",
    "http_options",
    "grpc_options",
    "controller_options",
    "logging_config",
    "tracing_config",
    "applications",
    "target_capacity",
)
_HTTP_KEYS = (
    "host",
    "port",
    "root_path",
    "request_timeout_s",
    "keep_alive_timeout_s",
    "ssl_keyfile",
    "ssl_certfile",
    "ssl_keyfile_password",
    "ssl_ca_certs",
)
_APPLICATION_KEYS = (
    "name",
    "route_prefix",
    "import_path",
    "runtime_env",
    "deployments",
    "autoscaling_policy",
    "args",
    "logging_config",
    "external_scaler_enabled",
)
_DEPLOYMENT_KEYS = (
    "name",
    "num_replicas",
    "max_ongoing_requests",
    "max_queued_requests",
    "backpressure_config",
    "user_config",
    "autoscaling_config",
    "graceful_shutdown_wait_loop_s",
    "graceful_shutdown_timeout_s",
    "health_check_period_s",
    "health_check_timeout_s",
    "ray_actor_options",
    "placement_group_bundles",
    "placement_group_strategy",
    "placement_group_bundle_label_selector",
    "max_replicas_per_node",
    "logging_config",
    "request_router_config",
    "gang_scheduling_config",
    "deployment_actors",
    "rolling_update_percentage",
    "max_surge_percent",
)
_PROXY_LOCATIONS = ("Disabled", "HeadOnly", "EveryNode")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            if isinstance(key, Hashable) and key != "<<":
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def parse(text: str) -> tuple[Any, Problem | None]:
    """The content of a YAML file, or the one problem that keeps it from being read, with line and column."""
    try:
        return yaml.load(text, Loader=_Loader), None
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = getattr(exc, "problem", None) or str(exc).splitlines()[0]
        return None, Problem("", f"not valid YAML: {where}{what}", action="fix the syntax there")


def check_serve(data: Any) -> list[Problem]:
    """Problems of everything but `args`. `data` is the parsed file."""
    if not isinstance(data, dict):
        return [Problem("", f"expected a mapping with applications, not {shown(data)}", "a Serve config file")]
    problems = _unknown(data, _TOP_KEYS, "")
    problems += _check_http(data.get("http_options"), uses_haproxy(data))
    problems += _check_controller(data.get("controller_options"))
    location = data.get("proxy_location")
    if location is not None and location not in _PROXY_LOCATIONS:
        problems.append(
            Problem("proxy_location", f"{shown(location)} is not possible", ", ".join(_PROXY_LOCATIONS), "use one")
        )
    applications = data.get("applications")
    if not isinstance(applications, list) or not applications:
        problems.append(Problem("applications", "is missing or empty", "a list with one application", "add it"))
        return problems
    if len(applications) > 1:
        problems.append(
            Problem("applications", f"holds {len(applications)} applications", "one", "use one file an application")
        )
    for index, application in enumerate(applications):
        problems += _check_application(application, f"applications[{index}]")
    return problems


def num_replicas(application: Mapping[str, Any]) -> dict[str, int]:
    """Replicas of each deployment that the file asks for at start; 1 where it says nothing or nonsense."""
    sizes = dict.fromkeys(DEPLOYMENTS, 1)
    for deployment in _mappings(application.get("deployments")):
        autoscaling = deployment.get("autoscaling_config")
        size = deployment.get("num_replicas")
        if isinstance(autoscaling, dict):
            size = autoscaling.get("initial_replicas") or autoscaling.get("min_replicas")
        name = deployment.get("name")
        if name in sizes and isinstance(size, int) and not isinstance(size, bool) and size > 0:
            sizes[name] = size
    return sizes


def controller_env(data: Mapping[str, Any]) -> dict[str, str]:
    """Environment variables that the file gives to Serve's controller, and with it to HAProxy and replicas."""
    return application_env(options) if isinstance(options := data.get("controller_options"), dict) else {}


def application_env(application: Mapping[str, Any]) -> dict[str, str]:
    """Environment variables of a `runtime_env`: of an application they reach each of its replicas."""
    env: Any = application
    for key in ("runtime_env", "env_vars"):
        env = env.get(key) if isinstance(env, dict) else None
    return {str(key): str(value) for key, value in env.items()} if isinstance(env, dict) else {}


def deployment_overrides(application: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The entries of `deployments` by name."""
    return {
        str(deployment["name"]): deployment
        for deployment in _mappings(application.get("deployments"))
        if deployment.get("name") in DEPLOYMENTS
    }


def uses_haproxy(data: Mapping[str, Any]) -> bool:
    """Whether Serve runs HAProxy in place of its own proxy."""
    return controller_env(data).get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def _check_http(http: Any, haproxy: bool) -> list[Problem]:
    if http is None:
        return []
    if not isinstance(http, dict):
        return [Problem("http_options", f"expected a mapping, not {shown(http)}", ", ".join(_HTTP_KEYS))]
    problems = _unknown(http, _HTTP_KEYS, "http_options")
    port = http.get("port", 8000)
    if not _is_int(port) or not 1 <= port <= 65535:
        problems.append(Problem("http_options.port", f"{shown(port)} is not a port", "1 to 65535", "change it"))
    if not isinstance(http.get("host", ""), str):
        problems.append(Problem("http_options.host", f"{shown(http['host'])} is not an address", "a string"))
    return problems + check_certificates(http, haproxy=haproxy)


def _check_controller(controller: Any) -> list[Problem]:
    if controller is None:
        return []
    path = "controller_options"
    if not isinstance(controller, dict):
        return [Problem(path, f"expected a mapping, not {shown(controller)}", "runtime_env")]
    problems = _unknown(controller, ("runtime_env",), path)
    runtime_env = controller.get("runtime_env")
    if runtime_env is None:
        return problems
    path += ".runtime_env"
    if not isinstance(runtime_env, dict):
        return [*problems, Problem(path, f"expected a mapping, not {shown(runtime_env)}", "env_vars")]
    problems += _unknown(runtime_env, ["env_vars"], path)
    env = runtime_env.get("env_vars") or {}
    path += ".env_vars"
    if not isinstance(env, dict):
        return [*problems, Problem(path, f"expected a mapping, not {shown(env)}", "names and strings")]
    problems += [
        Problem(f"{path}.{key}", f"{shown(value)} is not a string", "a string", f'write "{str(value).lower()}"')
        for key, value in env.items()
        if not isinstance(value, str)
    ]
    return problems


def _check_application(application: Any, path: str) -> list[Problem]:
    if not isinstance(application, dict):
        return [Problem(path, f"expected a mapping, not {shown(application)}", ", ".join(_APPLICATION_KEYS))]
    problems = _unknown(application, _APPLICATION_KEYS, path)
    import_path = application.get("import_path")
    if import_path != IMPORT_PATH:
        what = "is missing" if import_path is None else f"{shown(import_path)} builds no application of this framework"
        problems.append(Problem(f"{path}.import_path", what, IMPORT_PATH, f"write import_path: {IMPORT_PATH}"))
    if "route_prefix" in application:
        problems += _check_route_prefix(application["route_prefix"], f"{path}.route_prefix")
    if "args" not in application:
        problems.append(Problem(f"{path}.args", "is missing", action="add args with model.id and model.source"))
    external = application.get("external_scaler_enabled", False)
    if not isinstance(external, bool):
        problems.append(
            Problem(
                f"{path}.external_scaler_enabled", f"{shown(external)} is not possible", "true or false", "write true"
            )
        )
    deployments = application.get("deployments")
    if deployments is not None and not isinstance(deployments, list):
        problems.append(Problem(f"{path}.deployments", f"expected a list, not {shown(deployments)}", "a list"))
        deployments = []
    problems += _check_deployments(deployments or [], path, external=external is True)
    return problems


def _check_route_prefix(prefix: Any, path: str) -> list[Problem]:
    if not isinstance(prefix, str) or not prefix.startswith("/"):
        return [Problem(path, f"{shown(prefix)} gives clients no route", "a path from /", 'write "/"')]
    return []


def _check_deployments(deployments: list[Any], path: str, *, external: bool) -> list[Problem]:
    problems: list[Problem] = []
    seen: set[str] = set()
    for index, deployment in enumerate(deployments):
        where = f"{path}.deployments[{index}]"
        if not isinstance(deployment, dict):
            problems.append(Problem(where, f"expected a mapping, not {shown(deployment)}", "a mapping with name"))
            continue
        problems += _unknown(deployment, _DEPLOYMENT_KEYS, where)
        name = deployment.get("name")
        if name is None:
            problems.append(Problem(f"{where}.name", "is missing", ", ".join(DEPLOYMENTS), "add it"))
        elif name not in DEPLOYMENTS:
            problems.append(unknown_key(f"{where}.name", str(name), DEPLOYMENTS, what="deployment"))
        elif name in seen:
            problems.append(Problem(f"{where}.name", f"{name!r} appears twice", "each name once", "merge the entries"))
        seen.add(str(name))
        problems += _check_size(deployment, where, external=external)
        problems += _check_placement(deployment, where)
    if not external:
        problems.append(
            Problem(
                f"{path}.external_scaler_enabled",
                "is not set, so pools cannot be scaled while the application runs",
                action="add external_scaler_enabled: true",
                severity="warning",
            )
        )
    return problems


def _check_size(deployment: Mapping[str, Any], path: str, *, external: bool) -> list[Problem]:
    size, autoscaling = deployment.get("num_replicas"), deployment.get("autoscaling_config")
    problems: list[Problem] = []
    limits = f"1 to {MAX_NUM_REPLICAS}"
    if size is not None and size != "auto" and not (_is_int(size) and 1 <= size <= MAX_NUM_REPLICAS):
        problems.append(Problem(f"{path}.num_replicas", f"{shown(size)} is not a pool size", limits, "change it"))
    key = "autoscaling_config" if autoscaling is not None else "num_replicas" if size == "auto" else None
    if key is not None and deployment.get("name") != "gateway":
        problems.append(
            Problem(
                f"{path}.{key}",
                "nothing would act on it: no request passes through Serve's handle of a pool, so Serve sees no load",
                "a whole num_replicas",
                "set num_replicas here, and scale with `disagg scale` or the SDK",
            )
        )
        return problems
    if external and key is not None:
        problems.append(
            Problem(
                f"{path}.{key}",
                "autoscaling excludes external_scaler_enabled: true",
                "one of the two",
                "set a whole num_replicas here, or remove external_scaler_enabled",
            )
        )
    if autoscaling is None:
        return problems
    path = f"{path}.autoscaling_config"
    if not isinstance(autoscaling, dict):
        return [*problems, Problem(path, f"expected a mapping, not {shown(autoscaling)}", "a mapping")]
    if _is_int(size):
        problems.append(Problem(path, "excludes a fixed num_replicas", "one of the two", "remove num_replicas"))
    return problems + _check_bounds(autoscaling, path)


def _check_bounds(autoscaling: Mapping[str, Any], path: str) -> list[Problem]:
    problems = [
        Problem(
            f"{path}.{key}", f"{shown(autoscaling[key])} is not a pool size", f"1 to {MAX_NUM_REPLICAS}", "change it"
        )
        for key in ("min_replicas", "max_replicas", "initial_replicas")
        if autoscaling.get(key) is not None
        and not (_is_int(autoscaling[key]) and 1 <= autoscaling[key] <= MAX_NUM_REPLICAS)
    ]
    if problems:
        return problems
    low, high = autoscaling.get("min_replicas") or 1, autoscaling.get("max_replicas") or 1
    initial = autoscaling.get("initial_replicas")
    if low > high:
        problems.append(Problem(path, f"min_replicas {low} exceeds max_replicas {high}", action="raise max_replicas"))
    elif initial is not None and not low <= initial <= high:
        problems.append(Problem(f"{path}.initial_replicas", f"{initial} is outside the bounds", f"{low} to {high}"))
    return problems


def _check_placement(deployment: Mapping[str, Any], path: str) -> list[Problem]:
    if deployment.get("name") not in ("prefill", "decode"):
        return []
    actor_options = deployment.get("ray_actor_options")
    keys = [key for key in ("placement_group_bundles", "placement_group_strategy") if key in deployment]
    keys += [
        f"ray_actor_options.{key}"
        for key in ("num_cpus", "num_gpus")
        if isinstance(actor_options, dict) and key in actor_options
    ]
    return [
        Problem(
            f"{path}.{key}",
            "replaces what the framework derives from platform and the parallel sizes",
            action="remove it, unless the cluster needs it",
            severity="warning",
        )
        for key in keys
    ]


def _unknown(data: Mapping[Any, Any], known: Iterable[str], path: str) -> list[Problem]:
    known = list(known)
    return [unknown_key(f"{path}.{key}" if path else str(key), key, known) for key in data if key not in known]


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
