"""docs/metrics.md against the /metrics of a real worker and gateway."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from tests.monitoring.conftest import Processes
from tests.monitoring.queries import ROOT

PAGE = (ROOT / "docs/metrics.md").read_text("utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", re.MULTILINE)
UNITS = {"seconds": "s", "bytes": "bytes", "ratio": "1", "tokens": "tokens"}


def documented(section: str) -> dict[str, tuple[str, frozenset[str], str]]:
    """Type, labels and unit of each metric of a section, by name."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)), unit)
        for name, kind, labels, unit, *_ in ROW.findall(text)
    }
    assert len(rows) > 10
    return rows


@pytest.mark.parametrize(("section", "process"), [("Worker", "worker"), ("Gateway", "gateway")])
def test_every_exported_metric_is_documented_with_its_type_and_labels(
    processes: Processes, section: str, process: str
) -> None:
    types = re.findall(r"^# TYPE (\w+) (\w+)$", processes.page(getattr(processes, process)), re.MULTILINE)
    exported = {name: kind for name, kind in types if not name.endswith("_created")}
    rows = documented(section)
    assert {name: kind for name, (kind, _, _) in rows.items()} == exported
    samples = processes.samples()
    for name, (kind, labels, _) in rows.items():
        found = samples[f"{name}_count" if kind == "histogram" else name]
        assert found == {labels}, name


@pytest.mark.parametrize("section", ["Worker", "Gateway"])
def test_every_unit_is_that_of_the_name(section: str) -> None:
    for name, (_, _, unit) in documented(section).items():
        last = name.removesuffix("_total").rpartition("_")[2]
        assert unit == UNITS.get(last, unit), name


def test_every_metric_that_a_page_names_exists(processes: Processes) -> None:
    exported = {re.sub("_(bucket|count|sum)$", "", name) for name in processes.samples()}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        named = re.findall(r"`((?:worker|gateway)_\w+?)(?:\{.*?\})?`", page.read_text("utf-8"))
        metrics = {
            name for name in named if re.search("_(total|seconds|bytes|ratio|jobs|letters|tokens|info|reached)$", name)
        }
        assert metrics - exported == set(), page.name


def specifications() -> dict[str, list[str]]:
    """The metrics that docs/metrics.md names for the endpoint picker, from its flags and its configuration."""
    section = PAGE.partition("\n## Kubernetes inference gateway\n")[2]
    flags, configuration = re.findall(r"^```\w*\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    of_flags = [flag.partition("=")[2] for flag in shlex.split(flags)]
    engine = yaml.safe_load(configuration)["plugins"][0]["parameters"]["engineConfigs"][0]
    of_workers = re.findall(r"`(worker_\w+(?:\{.*?\})?)`", section)
    return {
        "flags": [spec for spec in of_flags if spec],
        "configuration": [spec for name, spec in engine.items() if name.endswith("Spec")],
        "workers": of_workers,
    }


@pytest.mark.parametrize("place", ["flags", "configuration", "workers"])
def test_the_endpoint_picker_finds_every_metric_that_it_is_told_to_read(processes: Processes, place: str) -> None:
    specs = specifications()[place]
    assert len(specs) == 3
    lines = "\n".join(processes.pages).splitlines()
    for spec in specs:
        name, _, labels = spec.rstrip("}").partition("{")
        wanted = [f'{pair.partition("=")[0]}="{pair.partition("=")[2]}"' for pair in labels.split(",") if pair]
        assert [x for x in lines if re.match(rf"{name}[ {{]", x) and all(pair in x for pair in wanted)], spec
