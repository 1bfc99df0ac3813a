# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a config, in plain words: where, what, what is allowed, what to do.

Also turns pydantic's errors into that form, so that a user never reads a traceback or a model's name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from pools.config import RESERVED_ENGINE_KWARGS

POOL_SIZE_KEYS = frozenset(
    {"num_replicas", "replicas", "size", "min_replicas", "max_replicas", "initial_replicas", "autoscaling_config"}
)


@dataclass(frozen=True)
class Problem:
    """One thing to change. An error stops the start; a warning does not."""

    path: str
    """Where in the YAML file, as `applications[0].args.model.source`; empty for the file as a whole."""
    message: str
    """What is wrong, with the value that is."""
    allowed: str | None = None
    """What is allowed there."""
    action: str | None = None
    """What to do."""
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.message}" if self.path else self.message]
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.action:
            parts.append(self.action)
        return "; ".join(parts)

    def as_dict(self) -> dict[str, str | None]:
        return asdict(self)


def unknown_key(path: str, key: str, known: Iterable[str], *, what: str = "key") -> Problem:
    """Problem for a key (or name) that does not exist, with the nearest that does."""
    known = sorted(known)
    guess = nearest(key, known)
    action = f"did you mean {guess!r}?" if guess is not None else "remove it"
    return Problem(path, f"unknown {what} {str(key)!r}", ", ".join(known), action)


def nearest(given: object, known: Iterable[str]) -> str | None:
    """The known name that is most like what was given, whatever its case; None when none is like it."""
    spelt = {name.lower(): name for name in known}
    guess = difflib.get_close_matches(str(given).lower(), spelt, n=1)
    return spelt[guess[0]] if guess else None


def problems_of(exc: ValidationError, root: type[BaseModel], data: object, prefix: str) -> list[Problem]:
    """Every error of a failed validation of `data` by `root`, in plain words, at paths below `prefix`."""
    problems: list[Problem] = []
    for error in exc.errors(include_url=False):
        loc = _without_tags(error["loc"], data)
        path = join(prefix, loc)
        keys = error.get("ctx", {}).get("keys_list")
        if keys:
            problems.extend(_engine_kwarg(f"{path}.{key}", key, error["type"]) for key in keys)
        elif error["type"] == "extra_forbidden":
            problems.append(_extra(path, loc, _model_at(root, error["loc"][:-1])))
        else:
            ctx = error.get("ctx", {})
            path = join(path, [ctx["field"]]) if ctx.get("field") else path
            problems.append(plain(path, error["type"], error["msg"], error["input"], ctx))
    return problems


def join(prefix: str, loc: Sequence[int | str]) -> str:
    """`prefix` and the parts of `loc` as one YAML path; numbers become indices."""
    path = prefix
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _engine_kwarg(path: str, key: str, kind: str) -> Problem:
    if kind == "shared_engine_kwarg":
        return Problem(path, f"{key} must be the same in both pools", action="move it to model.engine_kwargs")
    message = f"{key} is not an engine argument to set here"
    if key == "model" and ".model." not in path:
        return Problem(path, "both pools serve the same model", action="remove it and set model.source")
    return Problem(path, message, action=RESERVED_ENGINE_KWARGS[key])


def _extra(path: str, loc: Sequence[int | str], model: type[BaseModel] | None) -> Problem:
    key = str(loc[-1])
    known = list(model.model_fields) if model else []
    if key in POOL_SIZE_KEYS:
        return Problem(
            path, "pool sizes are not part of args", ", ".join(known), "set num_replicas of the pool in deployments[]"
        )
    if key in {"model", "model_id", "model_source"} and len(loc) > 1:
        return Problem(path, "both pools serve the same model", ", ".join(known), "remove it and set model.source")
    if "engine_kwargs" in known and not difflib.get_close_matches(key, known, n=1):
        return Problem(
            path, f"unknown key {key!r}", ", ".join(known), "if it is a vLLM argument, move it into engine_kwargs"
        )
    return unknown_key(path, key, known)


_EXPECTED = {
    "none": "null",
    "int": "a whole number",
    "float": "a number",
    "string": "a string",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "set": "a list",
    "dict": "a mapping",
    "dataclass": "a mapping",
    "model": "a mapping",
}


def expected(kind: str) -> str | None:
    """What pydantic wanted where its error says that the type is wrong; None for an error of another kind."""
    found = _EXPECTED.get(kind.split("_")[0])
    return found if kind.split("_")[-1] in {"type", "parsing", "float", "required"} else None


def names_in(kind: str, ctx: Mapping[str, Any]) -> list[str]:
    """The values of a Literal or an Enum that an error of pydantic lists; none for an error of another kind."""
    listed = str(ctx["expected"]) if kind in ("literal_error", "enum") else ""
    return [name.strip("'") for name in re.split(", | or ", listed) if name]


def plain(path: str, kind: str, message: str, value: object, ctx: Mapping[str, Any]) -> Problem:
    """One error of pydantic, by its type, in plain words."""
    got = shown(value)
    match kind:
        case "missing":
            return Problem(path, "is missing", action="add it")
        case "literal_error":
            return Problem(path, f"{got} is not possible here", str(ctx["expected"]), "use one of these")
        case "union_tag_invalid":
            tag, tags = str(ctx["tag"]), str(ctx["expected_tags"])
            return Problem(f"{path}.type", f"{tag!r} is not possible here", tags, "use one of these")
        case "union_tag_not_found":
            return Problem(f"{path}.type", "is missing", action="add it")
        case "greater_than_equal":
            return Problem(path, f"{got} is too small", f"{ctx['ge']} or more", "raise it")
        case "greater_than":
            return Problem(path, f"{got} is too small", f"more than {ctx['gt']:g}", "raise it")
        case "less_than_equal":
            return Problem(path, f"{got} is too large", f"at most {ctx['le']}", "lower it")
        case "less_than":
            return Problem(path, f"{got} is too large", f"less than {ctx['lt']:g}", "lower it")
        case "finite_number":
            return Problem(path, f"{got} is not finite", "a number", "write a number")
        case "string_pattern_mismatch":
            return Problem(path, f"{got} is not possible here", f"text like {ctx['pattern']}", "change it")
        case "string_too_short" | "too_short":
            return Problem(path, "is empty", "at least one entry" if kind == "too_short" else "a non-empty string")
    if (wanted := expected(kind)) is not None:
        return Problem(path, f"expected {wanted}, not {got}", wanted, "change the value")
    return Problem(path, message, ctx.get("allowed"), ctx.get("action"))


def shown(value: object) -> str:
    """A value as short text with the YAML name of its type."""
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"the string {text}"
        case dict():
            return f"the mapping {text}"
        case list() | tuple():
            return f"the list {text}"
    return text


def _without_tags(loc: tuple[int | str, ...], data: object) -> tuple[int | str, ...]:
    """`loc` without the variant names that pydantic puts behind a discriminated field."""
    kept: list[int | str] = []
    here: Any = data
    for index, part in enumerate(loc):
        if isinstance(here, dict) and part not in here and (index < len(loc) - 1 or part == here.get("type")):
            continue
        kept.append(part)
        if isinstance(here, dict):
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
    return tuple(kept)


def _model_at(root: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel] | None:
    """The model whose keys are at `loc`, or None where the keys are open."""
    candidates: list[type[BaseModel]] = [root]
    for part in loc:
        tagged = [model for model in candidates if part in _tags(model)]
        if tagged:
            candidates = tagged
            continue
        candidates = [
            model
            for owner in candidates
            if part in owner.model_fields
            for model in _models_in(owner.model_fields[str(part)].annotation)
        ]
    return candidates[0] if len(candidates) == 1 else None


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("type")
    return get_args(field.annotation) if field else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
