"""The dashboard and the alert rules against /metrics and docs/metrics.md, without a Prometheus server."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

from tests.monitoring.conftest import Processes
from tests.monitoring.queries import (
    DASHBOARD,
    OF_PROMETHEUS,
    ROOT,
    alerts,
    panel_queries,
    panels,
    selectors,
)
from worker.telemetry import FAULTS

QUERIES = panel_queries() | {rule["alert"]: rule["expr"] for rule in alerts()}
CASES = yaml.safe_load((ROOT / "tests/monitoring/rules_test.yaml").read_text())["tests"]


def test_every_series_of_every_query_is_exported_with_the_labels_that_it_matches(processes: Processes) -> None:
    exported = processes.samples()
    read = [(place, *selector) for place, query in QUERIES.items() for selector in selectors(query)]
    assert len(read) > len(QUERIES)
    for place, name, labels in read:
        if name not in OF_PROMETHEUS:
            assert name in exported, f"{place}: {name}"
            assert any(labels <= found for found in exported[name]), f"{place}: {name} has no labels {labels}"


def test_a_query_of_a_metric_that_does_not_exist_is_found() -> None:
    query = 'sum(rate(worker_no_such_total{a="b"}[5m])) / on (queue) max(worker_state offset 5m)'
    assert list(selectors(query)) == [("worker_no_such_total", {"a"}), ("worker_state", set())]


def test_the_dashboard_shows_every_metric(processes: Processes) -> None:
    shown = {name for query in panel_queries().values() for name, _ in selectors(query)}
    shown = {re.sub("_bucket$", "", name) for name in shown}
    exported = {
        re.sub("_(bucket|count|sum)$", "", name) for name in processes.samples() if not name.endswith("_created")
    }
    older = {"worker_preemptions", "worker_draft_tokens", "worker_accepted_draft_tokens"}
    assert exported - shown == older


def test_the_dashboard_is_what_its_script_writes(tmp_path) -> None:
    script = ROOT / "deploy/grafana/dashboard.py"
    code = f"import runpy, json; print(json.dumps(runpy.run_path({str(script)!r})['dashboard']()))"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(made.stdout) == json.loads(DASHBOARD.read_text())


def test_no_panel_covers_another_and_every_id_is_used_once() -> None:
    placed = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in placed}) == len(placed)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in placed)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({panel["title"] for panel in panels()}) == len(panels())


def test_the_faults_of_the_rules_are_those_of_the_worker() -> None:
    rule = next(each for each in alerts() if each["alert"] == "JobErrorsFrequent")
    sets = [set(match.split("|")) for match in re.findall(r'outcome=~"(.*?)"', rule["expr"])]
    assert sets == [set(FAULTS), {"completed", *FAULTS}]


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_has_a_severity_a_summary_and_a_section_that_says_what_to_do(rule) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert anchor in {re.sub("[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_has_a_case_in_which_it_fires_and_then_clears(rule) -> None:
    evaluations = [
        each["exp_alerts"] for case in CASES for each in case["alert_rule_test"] if each["alertname"] == rule["alert"]
    ]
    assert evaluations[0], "it does not fire"
    assert evaluations[-1] == [], "it does not clear"


def test_the_provisioned_source_and_folder_are_those_of_the_dashboard() -> None:
    folder = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["access"]) == ("prometheus", "proxy")
    (provider,) = yaml.safe_load((folder / "dashboards/worker.yaml").read_text())["providers"]
    assert provider["options"]["path"].startswith("/var/lib/grafana/")
    (variable, *_) = json.loads(DASHBOARD.read_text())["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", source["type"])
