"""The queries of the dashboard and of the rules, and the metrics that they name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy/grafana/dashboards/worker.json"
RULES = ROOT / "deploy/prometheus/rules.yaml"
OF_PROMETHEUS = {"up", "ALERTS"}
"""Series that a Prometheus server makes itself."""


def without_variables(query: str) -> str:
    """The query as Grafana sends it with every choice at All."""
    return query.replace("$__rate_interval", "1m").replace("$model", ".*").replace("$queue", ".*")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def panel_queries() -> dict[str, str]:
    """Each query of the dashboard by panel and legend."""
    return {
        f"{panel['title']}: {target['legendFormat']}": without_variables(target["expr"])
        for panel in panels()
        for target in panel["targets"]
    }


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def selectors(query: str) -> Iterator[tuple[str, set[str]]]:
    """Name of each series that the query reads, and the labels that it matches."""
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    for each in found:
        yield each.name, {matcher.name for matcher in each.matchers.matchers}
