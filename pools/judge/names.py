# SPDX-License-Identifier: Apache-2.0
"""Names that vLLM resolves only while it starts: parsers, methods, formats, backends, classes, plugins.

Each is asked of the registry that vLLM itself would ask, after its plugins have been loaded. A module that is not here
may be on the nodes; one that an installed package lacks is nowhere.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.config.mamba import MambaBackendEnum
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tool_parsers import ToolParserManager
from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from pools.judge.words import Error, raised

_CLASSES = ("scheduler_cls", "worker_cls", "worker_extension_cls")
_PLUGIN_OF = {"tool_call_parser": "tool_parser_plugin", "reasoning_parser": "reasoning_parser_plugin"}
PLUGINS = tuple(_PLUGIN_OF.values())
"""Arguments that name a file or a module which registers parsers."""


def is_registered(name: str) -> bool:
    """Whether a registry alone knows the values of an argument."""
    return name in _REGISTRIES


def name_errors(name: str, value: Any, given: Mapping[str, Any]) -> Iterator[Error]:
    """What is wrong with an argument as a name; nothing for arguments that are none.

    Args:
        value: of the type that the argument has, unless the argument `is_registered`.
        given: all arguments.
    """
    if name in PLUGINS:
        yield from plugin_errors(value)
    elif name == "structured_outputs_config" and isinstance(value, Mapping) and "reasoning_parser" in value:
        inner = name_errors("reasoning_parser", value["reasoning_parser"], given)
        yield from ({**error, "loc": ("reasoning_parser",)} for error in inner)
    elif name == "logits_processors" and value is not None:
        for index, one in enumerate(value):
            yield from ({**error, "loc": (index,)} for error in _object_errors(one, ":"))
    elif name in _CLASSES and value not in ("auto", "", None):
        yield from _object_errors(value, ".")
    elif name == "prefix_caching_hash_algo":
        try:
            get_hash_fn_by_name(value)(b"")
        except Exception as exc:
            yield raised(exc)
    elif name in _REGISTRIES and not _may_be_of_a_plugin(name, given):
        registry = _REGISTRIES[name]
        names = registry.names()
        if registry.spelt(str(value)) not in names:
            message = f"unknown {registry.what} {value!r}"
            yield {"kind": "name", "message": message, "ctx": {"what": registry.what, "names": sorted(names)}}


def _may_be_of_a_plugin(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a plugin that cannot be loaded here may register the parser."""
    plugin = _PLUGIN_OF.get(name)
    return plugin is not None and any(True for _ in plugin_errors(given.get(plugin)))


def plugin_errors(value: Any) -> Iterator[Error]:
    """What keeps a plugin, a file or a module that registers parsers, from being loaded."""
    if not value:
        return
    if str(value).endswith(".py") or "/" in str(value):
        if not Path(value).is_file():
            yield {"kind": "absent", "message": f"there is no file {value!r}"}
    else:
        yield from _module_errors(value)


def _object_errors(value: Any, separator: str) -> Iterator[Error]:
    """What keeps a class from being found by its name."""
    module, found, attribute = str(value).rpartition(separator)
    if not found or not module or not attribute:
        yield {"kind": "raised", "message": f"it is not module{separator}Class"}
    elif errors := list(_module_errors(module)):
        yield from errors
    elif not hasattr(loaded := importlib.import_module(module), attribute):
        classes = sorted(name for name, one in vars(loaded).items() if inspect.isclass(one))
        names = [f"{module}{separator}{one}" for one in classes]
        yield {"kind": "name", "message": f"{module} has no {attribute!r}", "ctx": {"what": "class", "names": names}}


def _module_errors(module: str) -> Iterator[Error]:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as exc:
        lacks = exc.name is not None and exc.name.startswith(f"{module.partition('.')[0]}.")
        yield {"kind": "raised" if lacks else "not_importable", "message": str(exc)}
    except Exception as exc:
        yield {"kind": "not_importable", "message": f"{type(exc).__name__}: {exc}"}


@dataclass(frozen=True)
class _Registry:
    what: str
    names: Callable[[], Collection[str]]
    spelt: Callable[[str], str] = str
    """How vLLM spells a name before it asks."""


def _load_formats() -> Collection[str]:
    # Imports every loader.
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    return set(_LOAD_FORMAT_TO_MODEL_LOADER)


def _attention_backends() -> Collection[str]:
    return {"AUTO", *AttentionBackendEnum.__members__}


_TAKEN_OVER = ("auto-round",)
"""Methods that a checkpoint may name and another one takes over, before vLLM looks at what the user said.

Source: vLLM 0.32 `INCConfig.override_quantization_method`.
"""
_REGISTRIES = {
    "attention_backend": _Registry("attention backend", _attention_backends, str.upper),
    "config_format": _Registry("config format", lambda: {"auto", *_CONFIG_FORMAT_TO_CONFIG_PARSER}),
    "load_format": _Registry("load format", _load_formats, str.lower),
    "mamba_backend": _Registry("Mamba backend", lambda: MambaBackendEnum.__members__.keys(), str.upper),
    "mm_encoder_attn_backend": _Registry("attention backend", _attention_backends, str.upper),
    "quantization": _Registry("quantization method", lambda: {*QUANTIZATION_METHODS, *_TAKEN_OVER}, str.lower),
    "reasoning_parser": _Registry("reasoning parser", lambda: {"", *ReasoningParserManager.list_registered()}),
    "tokenizer_mode": _Registry("tokenizer mode", lambda: {"auto", *RENDERER_REGISTRY.renderers}, str.lower),
    "tool_call_parser": _Registry("tool-call parser", ToolParserManager.list_registered),
}
