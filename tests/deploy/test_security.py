"""SECURITY.md: each test that it names as evidence exists."""

from __future__ import annotations

import re

import pytest

from tests.deploy.manifests import ROOT

NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text())


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[test or file for file, test in NAMED])
def test_the_evidence_of_a_claim_exists(file, test):
    text = (ROOT / file).read_text()
    assert re.search(rf"^(async )?def {test or 'test_'}", text, re.MULTILINE)


def test_every_claim_has_evidence():
    tables = re.findall(r"^\| .* held by \|\n\|[- |]+\n((?:\|.*\n)+)", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(tables) >= 7
    assert [row for row in rows if "`tests/" not in row.rsplit(" | ", 1)[-1]] == []
