# SPDX-License-Identifier: Apache-2.0
"""One value against the class of vLLM that holds it: its type, its bounds, and the class's own validators of the field.

No object is made of a value, because vLLM's classes look at the model and the device when they are made. So what holds
here holds on every platform.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import enum
import functools
import inspect
import textwrap
from collections.abc import Collection, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import vllm.config
from pydantic import TypeAdapter, ValidationError
from vllm.config import VllmConfig
from vllm.config.multimodal import MultiModalConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.utils.argparse_utils import human_readable_int_or_auto

from pools.engine.vllm_arguments import frontend_names
from pools.judge.words import Error, raised

_NO_ARGUMENT = "not_an_argument"
"""Given to a config class so that it refuses: it then says what is wrong with the fields, and goes no further."""
_BY_OTHER_NAMES = {
    "kv_cache_dtype": ("CacheConfig", "cache_dtype"),
    "log_config_file": ("LoggingConfig", "pylogging_config_file"),
    "log_level": ("LoggingConfig", "log_level"),
    "spec_method": ("SpeculativeConfig", "method"),
    "spec_model": ("SpeculativeConfig", "model"),
    "spec_tokens": ("SpeculativeConfig", "num_speculative_tokens"),
    **{
        name: ("VllmConfig", name)
        for name in (
            *("attention_config", "compilation_config", "diffusion_config", "kernel_config", "logging_config"),
            *("mamba_config", "speculative_config", "watermark_config"),
        )
    },
}
"""Fields of vLLM's config classes that its code does not fill by a keyword with the argument as it came."""
_ASSIGNED = {
    "cudagraph_capture_sizes": ("CompilationConfig", "cudagraph_capture_sizes"),
    "enable_flashinfer_autotune": ("KernelConfig", "enable_flashinfer_autotune"),
    "linear_backend": ("KernelConfig", "linear_backend"),
    "mamba_cache_philox_rounds": ("MambaConfig", "stochastic_rounding_philox_rounds"),
    "mamba_ssu_algorithm": ("MambaConfig", "ssu_algorithm"),
    "max_cudagraph_capture_size": ("CompilationConfig", "max_cudagraph_capture_size"),
    "moe_backend": ("KernelConfig", "moe_backend"),
    "sparse_indexer_topk_backend": ("KernelConfig", "sparse_indexer_topk_backend"),
}
"""Fields that vLLM sets on a finished object: no validator sees the value, which has to be of the type as it is."""
_MULTIMODAL = {"limit_mm_per_prompt": "limit_per_prompt"}
"""Fields of MultiModalConfig that are called otherwise than their arguments."""


def type_errors(name: str, value: Any) -> Iterator[Error]:
    """What the classes that hold an argument say of its value."""
    if name in frontend_names():
        yield from _field_errors(FrontendArgs, name, value)
    elif name in _ASSIGNED:
        owner, field = _ASSIGNED[name]
        yield from _annotation_errors(_annotation(_class(owner), field), value)
    elif (home := homes().get(name)) is not None:
        owner, field = home
        errors = list(_field_errors(_class(owner), field, value))
        field = _MULTIMODAL.get(name, name)
        if not errors and owner == "ModelConfig" and field in _init_fields(MultiModalConfig):
            errors = list(_field_errors(MultiModalConfig, field, value))
        yield from errors
    else:
        yield from _annotation_errors(AsyncEngineArgs.__dataclass_fields__[name].type, value)


@functools.cache
def homes() -> dict[str, tuple[str, str]]:
    """The config class and its field that an engine argument ends up in, as vLLM's own code has it.

    Source:
        vLLM 0.32 `EngineArgs.create_engine_config` and its like: `CacheConfig(block_size=self.block_size, ...)`.
    """
    found: dict[str, tuple[str, str]] = {}
    for call in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(EngineArgs)))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and hasattr(vllm.config, call.func.id):
            for keyword in call.keywords:
                if keyword.arg is not None and (name := _argument_in(keyword.value)) is not None:
                    found.setdefault(name, (call.func.id, keyword.arg))
    return {**found, **_BY_OTHER_NAMES}


def _argument_in(value: ast.expr) -> str | None:
    """The one argument that an expression passes on: `self.x`, `self.x if ... else None`, `self.x or 0`."""
    if isinstance(value, ast.Call):
        return None
    names = {
        node.attr
        for node in ast.walk(value)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    return names.pop() if len(names) == 1 else None


def _field_errors(owner: type[Any], field: str, value: Any, loc: tuple[Any, ...] = ()) -> Iterator[Error]:
    """What a config class says of one field. A mapping for a class inside it is taken apart."""
    inner = _nested(_annotation(owner, field))
    if inner is not None and isinstance(value, Mapping):
        for key, part in value.items():
            name = key.replace("-", "_") if field == "speculative_config" else key
            if name in _init_fields(inner):
                yield from _field_errors(inner, name, part, (*loc, key))
            else:
                ctx = {"what": "key", "names": sorted(_init_fields(inner))}
                yield {"kind": "name", "loc": (*loc, key), "message": f"unknown key {key!r}", "ctx": ctx}
        return
    # Its other fields get a value each, because some of their defaults look at the device.
    others: dict[str, Any] = dict.fromkeys(_init_fields(owner)) if owner is VllmConfig else {}
    try:
        owner(**{**others, field: value, _NO_ARGUMENT: None})
    except ValidationError as exc:
        errors = [error for error in exc.errors(include_url=False) if error["loc"][:1] == (field,)]
        yield from (_pydantic(error, (*loc, *error["loc"][1:])) for error in errors)
    except Exception as exc:  # its validators raise what they like
        names = _members(_annotation(owner, field))
        ctx = {"what": "value", "names": names}
        error = {"kind": "name", "message": f"unknown {field} {value!r}", "ctx": ctx} if names else raised(exc)
        yield {**error, "loc": loc}


def _annotation_errors(annotation: Any, value: Any) -> Iterator[Error]:
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError as exc:
        yield from (_pydantic(error, error["loc"]) for error in exc.errors(include_url=False))


def _pydantic(error: Any, loc: tuple[Any, ...]) -> Error:
    given = error.get("ctx", {})
    ctx = {key: part if isinstance(part, str | int | float) else str(part) for key, part in given.items()}
    if error["type"] == "int_parsing" and isinstance(error["input"], str):
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            ctx["written"] = human_readable_int_or_auto(error["input"])
    return {"kind": error["type"], "loc": loc, "message": error["msg"], "ctx": ctx}


def _class(name: str) -> type[Any]:
    found: type[Any] = getattr(vllm.config, name)
    return found


def _init_fields(owner: type[Any]) -> Collection[str]:
    return inspect.signature(owner).parameters.keys()


def _annotation(owner: type[Any], field: str) -> Any:
    """The type of a field with its bounds."""
    known = owner.__pydantic_fields__.get(field)
    if known is None:  # a parameter of `__post_init__`, which is no field
        return Any
    return Annotated[(known.annotation, *known.metadata)] if known.metadata else known.annotation


def _nested(annotation: Any) -> type[Any] | None:
    """The config class that a field holds, alone or besides None, and not in a list or a mapping."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return annotation
    parts = get_args(annotation) if get_origin(annotation) in (Annotated, Union, UnionType) else ()
    return next((found for part in parts if (found := _nested(part)) is not None), None)


def _members(annotation: Any) -> list[str]:
    """Names of the enum that a field holds, alone or besides other types."""
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        return list(annotation.__members__)
    return [name for part in get_args(annotation) for name in _members(part)]


def is_default(name: str, value: Any) -> bool:
    """Whether it is what vLLM has where the argument is not given."""
    owner = FrontendArgs if name in frontend_names() else AsyncEngineArgs
    field = owner.__dataclass_fields__[name]
    return bool(value == (field.default_factory() if callable(field.default_factory) else field.default))
