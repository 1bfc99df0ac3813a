# SPDX-License-Identifier: Apache-2.0
"""Writes the generated pages of docs/: `python -m disagg.pages.generate`; with `--check` it compares.

Names, types, defaults and descriptions have their home on the config models' fields and on the metrics, so the pages
cannot drift. The page of the metrics is `disagg.pages.metrics`, that of the API `disagg.pages.api`, and a section of
that of the tiers `disagg.pages.layouts`.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from disagg.config import AppConfig
from disagg.pages import api as api_page
from disagg.pages import layouts as layouts_section
from disagg.pages import metrics as metrics_page
from pools.config import RESERVED_ENGINE_KWARGS, SHARED_ENGINE_KWARGS, WITHOUT_EFFECT

PAGE = Path("docs/configuration.md")
METRICS_PAGE = Path("docs/metrics.md")
API_PAGE = Path("docs/api.md")

_HEAD = """# Configuration

Written by `python -m disagg.pages.generate` from the config models. Do not edit it by hand.

A configuration is a Ray Serve config file with one application. `disagg check FILE` lists everything that is wrong
with it and prints what will run, without starting anything. Unknown keys are errors everywhere.

```yaml
http_options:
  host: 127.0.0.1
  port: 8000
applications:
  - name: disagg
    route_prefix: /
    import_path: disagg.app:build
    external_scaler_enabled: true # needed by `disagg scale`; excludes Serve's autoscaling
    args: # the tables below; a change restarts every deployment
      model:
        id: tiny
        source: .cache/tiny-model
      platform: cpu
    deployments: # a change of num_replicas restarts nothing
      - name: gateway
        num_replicas: 1
      - name: prefill
        num_replicas: 1
      - name: decode
        num_replicas: 1
```

Pool sizes are `deployments[].num_replicas`, never part of `args`. The deployments are named `gateway`, `prefill` and
`decode`. A GPU engine takes `tensor_parallel_size` x `pipeline_parallel_size` GPUs; placement follows from these.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    parts += [_section(path, model) for path, model in _models("args", AppConfig)]
    parts.append(_kwargs_section())
    return "\n".join(parts)


def _section(path: str, model: type[BaseModel]) -> str:
    name, _, variant = path.partition(" ")
    title = f"## `{name}` {variant}".rstrip()
    lines = [title, "", _one_line(model.__doc__), "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        cells = [f"`{key}`", _type(field), _default(field), _one_line(field.description)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _kwargs_section() -> str:
    lines = [
        "## `engine_kwargs`",
        "",
        "Any argument of vLLM's engine and OpenAI server, with underscores. `disagg check` reads their names from the",
        "installed vLLM, and has its classes and registries judge the values in a process of its own. Where vLLM is",
        "not installed, it says that it could not. A pool's own `engine_kwargs` win over `model.engine_kwargs`.",
        "",
        "Values are those of YAML: numbers are written out (`4096`, not `4K` as on vLLM's command line), and what is",
        "JSON there is a mapping or a list here.",
        "",
        "Refused, because the framework sets them, or because no client meets the engine:",
        "",
        "| argument | instead |",
        "|---|---|",
        *(f"| `{name}` | {advice} |" for name, advice in RESERVED_ENGINE_KWARGS.items()),
        "",
        "Warned of, because nobody would notice them:",
        "",
        "| argument | why |",
        "|---|---|",
        *(f"| `{name}` | {reason} |" for name, reason in WITHOUT_EFFECT.items()),
        "",
        "Only in `model.engine_kwargs`, because both pools and the gateway must agree on them: "
        + ", ".join(f"`{name}`" for name in sorted(SHARED_ENGINE_KWARGS))
        + ".",
        "",
        "With `platform: cpu`, `enforce_eager: true` and `dtype: bfloat16` are the defaults, and",
        "`worker_extension_cls` is taken.",
    ]
    return "\n".join([*lines, ""])


def _models(path: str, model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    found = [(path, model)]
    for name, field in model.model_fields.items():
        inner = _models_in(field.annotation)
        for child in inner:
            suffix = f" (`type: {get_args(child.model_fields['type'].annotation)[0]}`)" if len(inner) > 1 else ""
            (_, _), *below = _models(f"{path}.{name}", child)
            found += [(f"{path}.{name}{suffix}", child), *below]
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation) + _bounds(_constraints(field))


def _constraints(field: FieldInfo) -> list[Any]:
    inner = [entry for part in get_args(field.annotation) for entry in getattr(part, "__metadata__", ())]
    nested = [entry for info in inner for entry in getattr(info, "metadata", ())]
    return [*field.metadata, *nested]


def _bounds(constraints: Sequence[Any]) -> str:
    bounds = []
    for constraint in constraints:
        match constraint:
            case Ge(ge=low):
                bounds.append(f">= {low}")
            case Gt(gt=low):
                bounds.append(f"> {low}")
            case Le(le=high):
                bounds.append(f"<= {high}")
    return f" ({', '.join(bounds)})" if bounds else ""


def _type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if _models_in(annotation):
        return "list of mappings" if origin is tuple else "mapping"
    if annotation is type(None):
        return "null"
    if hasattr(annotation, "__metadata__"):
        return _type_name(inner[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in inner)
    if origin is tuple:
        return f"list of {_type_name(inner[0])}"
    names = {int: "whole number", float: "number", str: "string", bool: "boolean"}
    return names.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        tag = getattr(value, "type", None)
        return f"`type: {tag}`" if tag else "see below"
    return f"`{json.dumps(value)}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def pages() -> dict[Path, str]:
    """Every generated page by its path in the repository. Reads those of which only a section is generated."""
    tiers = layouts_section.PAGE
    return {
        PAGE: page(),
        METRICS_PAGE: metrics_page.page(),
        API_PAGE: api_page.page(),
        tiers: layouts_section.page(tiers.read_text(encoding="utf-8")),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or with `--check` return 1 if one of them is not current."""
    parser = argparse.ArgumentParser(prog="python -m disagg.pages.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when a page is not current")
    args = parser.parse_args(argv)
    if not args.check:
        for path, text in pages().items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        sys.stderr.write(f"{path} is not current; run `python -m disagg.pages.generate`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
