# SPDX-License-Identifier: Apache-2.0
"""docs/metrics.md against the metrics, and the documented label values against the code that sets them."""

from __future__ import annotations

import ast
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from disagg.gateway.front.fields import Endpoint
from disagg.gateway.handoff.call import Phase
from disagg.gateway.handoff.hedging import Outcome
from disagg.gateway.replicas.membership import POOLS
from disagg.observability.engine_metrics import ENGINE_METRICS, SERVER_METRICS
from disagg.observability.metrics import AMOUNTS, QUARANTINES, TIERS, Metrics
from disagg.observability.outcomes import TOTALS
from disagg.pages import generate as docs
from disagg.pages import layouts
from disagg.pages.metrics import LABEL_VALUES, LOCAL_PREFILL_REASONS, MetricInfo, metrics
from disagg.routing.candidates import NO_WARM_PAIR
from disagg.routing.views import Mode
from pools.engine.base import EngineStats
from transport.handoff_params import Store

ROOT = Path(__file__).parents[4]
GATEWAY = ROOT / "disagg" / "gateway"
TEXT = (ROOT / docs.METRICS_PAGE).read_text(encoding="utf-8")


def test_page_is_current() -> None:
    """docs/metrics.md is what the metrics say."""
    assert docs.pages()[docs.METRICS_PAGE] == TEXT, "run `python -m disagg.pages.generate`"


@pytest.mark.parametrize("metric", metrics(), ids=lambda metric: metric.name)
def test_page_names_every_metric(metric: MetricInfo) -> None:
    """Each metric has its own row, with its type and every label."""
    (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{metric.name}` |")]
    assert f"| {metric.type} |" in row
    assert all(f"`{label}`" in row for label in metric.labels)


def test_every_series_is_documented() -> None:
    """The registry holds nothing beside the listed metrics."""
    registered = {family.name for family in Metrics().registry.collect()}
    assert registered == {metric.family for metric in metrics()}


def test_label_values_name_real_labels() -> None:
    """Label values are documented for every label that exists and for no other."""
    labels = {metric.family: metric.labels for metric in metrics() if metric.labels}
    assert {family: tuple(values) for family, values in LABEL_VALUES.items()} == labels


def test_local_prefill_reasons_are_those_of_the_code() -> None:
    """The documented reasons are exactly the words that the gateway counts."""
    assert reasons_in_code() == set(LOCAL_PREFILL_REASONS)


def test_label_values_are_those_of_the_code() -> None:
    """Every word that the gateway passes to `labels` is documented, and no documented word is unused."""
    used = label_words_in_code()
    used["disagg_requests", "endpoint"] |= set(get_args(Endpoint))
    used["disagg_requests", "mode"] |= set(get_args(Mode))
    used["disagg_replicas", "pool"] |= set(POOLS)
    used["disagg_local_prefills", "reason"] |= reasons_in_code()
    used["disagg_handoffs", "outcome"] |= set(TOTALS)
    used["disagg_handoff_tokens", "outcome"] |= set(AMOUNTS)
    used["disagg_handoff_bytes", "outcome"] |= set(AMOUNTS)
    used["disagg_stores", "store"] |= set(get_args(Store))
    used["disagg_tier_degraded", "tier"] |= set(TIERS)
    used["disagg_hedges", "outcome"] |= set(get_args(Outcome))
    used["disagg_foreign_handoffs", "outcome"] |= set(TOTALS)
    used["disagg_client_disconnects", "phase"] |= set(get_args(Phase))
    used["disagg_quarantines", "pool"] |= set(POOLS)
    used["disagg_crash_loops", "pool"] |= set(POOLS)
    used["disagg_quarantines", "reason"] |= set(QUARANTINES)
    used["disagg_resumes", "outcome"] |= words_of("resuming.py", "_give_up")
    for metric in (*ENGINE_METRICS, *SERVER_METRICS):
        used[metric.family, "pool"] |= set(POOLS)
    documented = {(family, label): set(v) for family, of in LABEL_VALUES.items() for label, v in of.items() if v}
    assert {key: words for key, words in used.items() if words} == documented


def test_engine_metrics_are_statistics_of_engines() -> None:
    """Each is a field that engines tell, and a counter exactly when that one says so."""
    for metric in ENGINE_METRICS:
        assert metric.key in {field.name for field in dataclasses.fields(EngineStats)}
        assert (metric.type == "counter") == metric.key.endswith("_total")


def test_check_says_which_page_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` fails on a missing or edited page, names it, and passes after a run without it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / layouts.PAGE).parent.mkdir()
    (tmp_path / layouts.PAGE).write_text(f"# Tiers\n\n{layouts.BEGIN}\n{layouts.END}\n")
    assert docs.main(["--check"]) == 1
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    (tmp_path / docs.METRICS_PAGE).write_text("edited")
    assert docs.main(["--check"]) == 1
    assert str(docs.METRICS_PAGE) in capsys.readouterr().err


def reasons_in_code() -> set[str]:
    """Words of what requests rule out, of pairs that are missing, of `PrefillFailed`, and those with which `handoff`
    sends a request to decode alone and `prefilling` keeps or counts."""
    found: set[str] = {NO_WARM_PAIR}
    constraints = ast.parse((ROOT / "disagg" / "routing" / "constraints.py").read_text(encoding="utf-8"))
    for call in calls(constraints, "_alone"):
        found |= words(*call.args[:1])
    for path in GATEWAY.rglob("transfer*.py"):
        for call in calls(parsed(path.name), "PrefillFailed"):
            found |= words(*call.args[:1])
    for call in calls(parsed("handoff.py"), "alone"):
        found |= words(*call.args[1:2])
    tree = parsed("prefilling.py")
    for call in calls(tree, "local_prefill"):
        found |= words(*call.args[:1])
    for statement in ast.walk(tree):
        # `handed_off` keeps what it raises NotOffered with.
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "reason":
            found |= words(statement.value)
    return found


def label_words_in_code() -> defaultdict[tuple[str, str], set[str]]:
    """String constants in arguments of `<metrics>.<metric>.labels(...)`, by metric family and label."""
    by_attribute = {name: value for name, value in vars(Metrics()).items() if hasattr(value, "describe")}
    infos = {metric.family: metric for metric in metrics()}
    found: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for path in [*GATEWAY.rglob("*.py"), *(ROOT / "disagg" / "observability").glob("*.py")]:
        for call in calls(ast.parse(path.read_text(encoding="utf-8")), "labels"):
            target = call.func.value if isinstance(call.func, ast.Attribute) else None
            if not isinstance(target, ast.Attribute) or target.attr not in by_attribute:
                continue
            info = infos[next(iter(by_attribute[target.attr].describe())).name]
            for label, argument in zip(info.labels, call.args, strict=True):
                found[info.family, label] |= words(argument)
    return found


def words_of(file: str, function: str) -> set[str]:
    """First arguments of the calls of one function in one file of the gateway."""
    return {word for call in calls(parsed(file), function) for word in words(*call.args[:1])}


def parsed(name: str) -> ast.Module:
    (path,) = GATEWAY.rglob(name)
    return ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name in (getattr(node.func, "id", None), getattr(node.func, "attr", None)):
            yield node


def words(*nodes: ast.AST) -> set[str]:
    """String constants that an expression may have as its value: literals and both arms of a condition."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.IfExp):
            found |= words(node.body, node.orelse)
    return found
