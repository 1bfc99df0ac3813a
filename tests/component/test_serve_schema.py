# SPDX-License-Identifier: Apache-2.0
"""The keys that `disagg check` knows are those of Ray Serve's own schema, which the shipped configs pass, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve import schema

from disagg.advice import serve_file

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("known", "model", "left_out"),
    [
        (serve_file._TOP_KEYS, schema.ServeDeploySchema, set()),
        (serve_file._HTTP_KEYS, schema.HTTPOptionsSchema, set()),
        # Of a file with a single application, which Serve does not read any more: it refuses them beside others.
        (serve_file._APPLICATION_KEYS, schema.ServeApplicationSchema, {"host", "port"}),
        (serve_file._DEPLOYMENT_KEYS, schema.DeploymentSchema, set()),
    ],
    ids=["top", "http_options", "applications", "deployments"],
)
def test_known_keys_are_serves(known: tuple[str, ...], model: Any, left_out: set[str]) -> None:
    """No key of Serve's is unknown to the check, and the check knows none that Serve lacks."""
    assert set(known) == set(model.model_fields) - left_out
    assert len(known) == len(set(known))


def test_proxy_locations_are_serves() -> None:
    """The places of a proxy are those of Serve's enumeration."""
    assert set(serve_file._PROXY_LOCATIONS) == {place.value for place in schema.ProxyLocation}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_serve_takes_the_shipped_configs(file: Path) -> None:
    """Serve's schema accepts each config, and keeps every deployment of it."""
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    accepted = schema.ServeDeploySchema.model_validate(data)
    names = [deployment.name for deployment in accepted.applications[0].deployments]
    assert names == [deployment["name"] for deployment in data["applications"][0]["deployments"]]
