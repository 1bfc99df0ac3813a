# SPDX-License-Identifier: Apache-2.0
"""The models themselves."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from disagg.config import AppConfig
from disagg.pages.generate import PAGE, page
from pools.config import RESERVED_ENGINE_KWARGS, SHARED_ENGINE_KWARGS

ROOT = Path(__file__).parents[3]
MINIMAL = {"model": {"id": "m", "source": "org/m"}}


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """Every model below `model`, itself included."""
    from disagg.pages.generate import _models

    return {found for _, found in _models("args", model)}


def test_minimal() -> None:
    """A model's name and source are enough."""
    config = AppConfig.model_validate(MINIMAL)
    assert (config.platform, config.transport.type, config.engine.type) == ("cuda", "nixl", "vllm")


def test_round_trips() -> None:
    """A config crosses process boundaries by pickle and by JSON."""
    config = AppConfig.model_validate({**MINIMAL, "engine": {"type": "fake"}})
    assert pickle.loads(pickle.dumps(config)) == config
    assert AppConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("model", sorted(models(AppConfig), key=lambda m: m.__name__), ids=lambda m: m.__name__)
def test_models_are_strict_and_documented(model: type[BaseModel]) -> None:
    """Each model is frozen, refuses unknown keys and describes every field."""
    assert (model.model_config["frozen"], model.model_config["extra"]) == (True, "forbid")
    assert [name for name, field in model.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("platform", "given", "num_cpus"), [("cpu", None, 0.1), ("cuda", None, 1.0), ("cpu", 2.0, 2.0)]
)
def test_gateway_cpus(platform: str, given: float | None, num_cpus: float) -> None:
    """The gateway takes few cores where there are few, unless told."""
    config = AppConfig.model_validate({**MINIMAL, "platform": platform, "gateway": {"num_cpus": given}})
    assert config.gateway_num_cpus == num_cpus


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_engine_kwargs_pass_through(pool: str) -> None:
    """What is neither reserved nor shared passes through as it is."""
    kwargs = {"max_num_seqs": 3, "compilation_config": {"mode": 0}}
    assert getattr(AppConfig.model_validate({**MINIMAL, pool: {"engine_kwargs": kwargs}}), pool).engine_kwargs == kwargs


@pytest.mark.parametrize("key", sorted(RESERVED_ENGINE_KWARGS))
def test_reserved(key: str) -> None:
    """Arguments that the framework sets are refused for model and pool."""
    for place in ({"model": {**MINIMAL["model"], "engine_kwargs": {key: 1}}}, {"prefill": {"engine_kwargs": {key: 1}}}):
        with pytest.raises(ValidationError, match=key):
            AppConfig.model_validate({**MINIMAL, **place})


def test_reserved_and_shared_are_apart() -> None:
    """No argument is told both to go to the model and to go away."""
    assert not SHARED_ENGINE_KWARGS & RESERVED_ENGINE_KWARGS.keys()


def test_page_is_current() -> None:
    """docs/configuration.md is what the models say."""
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page(), "run `python -m disagg.pages.generate`"
