"""Alerts and the dashboard: promtool's own tests pass, and no metric is named that the service does not export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.playbooks import FLEET
from support.synthetic import snapshot, with_usage

from memconsole import unforeseen
from memconsole.backend.wire import metrics
from memconsole.model import Condition, Faults, Readiness, Severity

RULES, TESTS = (FLEET / "prometheus" / f"memconsole.{name}.yml" for name in ("rules", "test"))
DASHBOARD: dict[str, Any] = json.loads((FLEET / "grafana/memconsole.json").read_text(encoding="utf-8"))
PROMTOOL = shutil.which("promtool")
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? ", re.MULTILINE)


def exported() -> dict[str, set[str]]:
    """The samples of a host that has something of everything, each with the labels that it has."""
    shown = with_usage(snapshot(30, 6))
    failing = Condition("hugetlb", Severity.ERROR, False, "none", "lost", "some", "reserve")
    shown = replace(
        shown,
        readiness=Readiness(1, failing=(failing,), total=30),
        grants=(replace(shown.grants[0], lazy=True, faults=Faults(True, 1, 2, 3)), *shown.grants[1:]),
    )
    unforeseen.named(ValueError("of this test"), "it failed", "call")
    found: dict[str, set[str]] = {}
    for name, labels in SAMPLE.findall(metrics.exposition(shown)):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def asked() -> Iterator[str]:
    """Every expression of the dashboard and of the rules."""
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable)
    yield from re.findall(r"^ +expr: (.+)$", RULES.read_text(encoding="utf-8"), re.MULTILINE)


def test_no_expression_names_what_is_not_exported() -> None:
    known, expressions = exported(), list(asked())
    assert len(expressions) == 25
    for expression in expressions:
        names = re.findall(r"memconsole_\w+", expression)
        assert names, expression
        assert sorted(set(names) - known.keys()) == []
        labels = {*re.findall(r"(\w+)=~?\"", expression)}
        for listed in re.findall(r"by \(([\w, ]+)\)", expression):
            labels.update(listed.split(", "))
        assert labels - {"instance"} <= set().union(*(known[name] for name in names)), expression


def test_what_alerts_say_names_labels_that_their_metrics_have() -> None:
    known = exported()
    rules = re.split(r"^ +- alert: ", RULES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(rules) == 8
    for rule in rules:
        names = re.findall(r"memconsole_\w+", rule.split("labels:")[0])
        labels = set().union(*(known[name] for name in names))
        assert set(re.findall(r"\$labels\.(\w+)", rule)) <= labels | {"instance"}, rule
        assert rule.split("\n")[0] in TESTS.read_text(encoding="utf-8")


def test_panels_lie_beside_each_other_and_have_ids_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
@pytest.mark.parametrize(("words", "path"), [(("check", "rules"), RULES), (("test", "rules"), TESTS)])
def test_promtool_passes_the_rules_and_their_tests(words: tuple[str, str], path: Path) -> None:
    ended = subprocess.run([str(PROMTOOL), *words, str(path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
