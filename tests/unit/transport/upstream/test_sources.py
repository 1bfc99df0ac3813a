# SPDX-License-Identifier: Apache-2.0
"""Names found in source text that is never imported."""

from __future__ import annotations

import pytest

from transport.upstream.sources import Sources

TREE = {
    "kv.__init__": "from .base import Base as Connector\nfrom elsewhere import tool\nVERSION: str\n",
    "kv": "from .base import Base as Connector\nfrom elsewhere import tool\nVERSION: str\n",
    "kv.base": """
import torch
from typing import Generic

class Base:
    _socket_class = None
    limit: int = 3

    def __init__(self, role):
        self._role = role
        if role:
            self._leases: dict[str, float] = {}

    @property
    def role(self):
        return self._role

    @classmethod
    def build(cls, data, *, strict=False, **rest):
        return cls(data)
""",
    "kv.pull": """
from kv import Connector
from kv import base as kv_base

try:
    from nixl import agent
except ImportError:
    agent = None

class Pull(Connector):
    def load(self, blocks, /, *more):
        return blocks

class Other(kv_base.Base):
    pass

if True:
    async def later():
        pass
else:
    later = None
""",
}


@pytest.fixture
def sources() -> Sources:
    return Sources(TREE.get)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("kv.pull", None),
        ("kv.pull:Pull", None),
        ("kv.pull:Pull.load", ("self", "blocks", "*more")),
        ("kv.pull:Pull.build", ("cls", "data", "*", "strict", "**rest")),
        ("kv.pull:Pull._leases", None),
        ("kv.pull:Other._role", None),
        ("kv.pull:Other.role", ("self",)),
        ("kv:Connector._socket_class", None),
        ("kv:Connector.limit", None),
        ("kv:VERSION", None),
        ("kv:tool", None),
        ("kv:base", None),
        ("kv.pull:agent", None),
        ("kv.pull:later", ()),
    ],
)
def test_what_is_written_down_is_found(sources: Sources, name: str, parameters: tuple[str, ...] | None) -> None:
    """Modules, classes, members of bases in other modules, attributes of instances, imports and conditional names."""
    found = sources.find(name)
    assert found is not None
    assert found.parameters == parameters


@pytest.mark.parametrize(
    "name", ["gone", "kv.gone:Pull", "kv.pull:Gone", "kv.pull:Pull.gone", "kv.pull:Pull._leases.gone", "kv:tool.gone"]
)
def test_what_is_not_there_is_not_found(sources: Sources, name: str) -> None:
    """A module, a class, a member, and what belongs to a value or to another package."""
    assert sources.find(name) is None


def test_the_source_is_that_of_the_definition(sources: Sources) -> None:
    """Through an import and a base class, with its decorator and without what follows."""
    found = sources.find("kv.pull:Pull.role")
    assert found is not None
    assert found.source.split() == "@property def role(self): return self._role".split()
