"""Tables and plot of a result that was measured on an H100 (`tests/data/bench`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.recorded import read
from benchmarks.reference import REFERENCES
from benchmarks.report import BEGIN, END, put_into, report

SAMPLE = Path(__file__).parents[1] / "data" / "bench" / "qwen2.5-0.5b.json"


@pytest.fixture
def sample():
    return read([SAMPLE])[0]


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_each_goal_has_the_measured_figure_and_llama_cpps(sample):
    table = {row[1]: row[2:] for row in rows(report([sample])) if len(row) == 6}
    assert table["decode after 128 tokens, tokens/s"] == ["1,208", "1,600", "2,500", "893 (after 0)"]
    assert table["decode after 3,500, tokens/s"] == ["1,112", "", "", "821"]
    assert table["prefill of 2,048, tokens/s"] == ["45,267", "90,000", "", "59,200"]
    assert table["first token of 128, XADD to reader, p95, ms"] == ["37.80", "≤ 6", "", ""]
    assert table["a job's tokens/s through the server"][0] == "99.8 %"


def test_the_bound_of_a_long_context_is_5_percent_plus_its_keys_and_values_at_60_percent_bandwidth(sample):
    (row,) = [row for row in rows(report([sample])) if row[1].startswith("a token after 3,500")]
    # 1e6/1112.12 - 1e6/1207.94 µs, and 0.05·827.9 + (3500 - 128)·12,288 B / (0.6·3,051 kB/µs)
    assert row[2:4] == ["71", "≤ 64"]


def test_decode_rows_have_bytes_share_of_bandwidth_and_limit(sample):
    table = [row for row in rows(report([sample])) if len(row) == 7]
    assert [row[1] for row in table[2:]] == ["128", "512", "1,024", "2,048", "3,500", "8,192"]
    assert table[2] == ["qwen2.5-0.5b", "128", "1,208 (1,205 to 1,215)", "393.8", "476", "15.6 %", "7,746"]


def test_prefill_rows_have_llama_cpps_figure_if_one_exists(sample):
    theirs = {row[1]: row[7] for row in rows(report([sample])) if len(row) == 8}
    assert (theirs["512"], theirs["1,024"], theirs["8,192"]) == ("46,700", "–", "74,200")


def test_a_model_without_goals_is_reported_without_goals(tmp_path):
    given = json.loads(SAMPLE.read_text())
    given["model"]["file"] = "other.gguf"
    path = tmp_path / "other.json"
    path.write_text(json.dumps(given))
    text = report(read([path]))
    assert "No goals are set" in text
    assert "other" in text


def test_models_are_grouped_by_machine_and_commit(sample, tmp_path):
    given = json.loads(SAMPLE.read_text())
    given["commit"] = "another"
    path = tmp_path / "q.json"
    path.write_text(json.dumps(given))
    text = report([sample, *read([path]), sample])
    assert text.count("NVIDIA H100") == 2


def test_goals_are_set_for_four_models():
    assert list(REFERENCES) == ["qwen2.5-0.5b", "llama-3.2-1b", "phi-3-mini", "gpt-oss-20b"]
    for goal in REFERENCES.values():
        assert goal.llama_decode[0] < goal.min_decode < goal.target_decode
        assert set(goal.llama_prefill) == {128, 512, 2048, 8192}


def test_put_into_keeps_the_text_outside_the_marks(tmp_path):
    page = tmp_path / "page.md"
    begin, end = BEGIN.format("measured"), END.format("measured")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    put_into(page, "new")
    put_into(page, "newer")
    assert page.read_text() == f"before\n{begin}\n\nnewer\n\n{end}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="no marks; expected"):
        put_into(page, "new")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "figures": {}}'])
def test_a_file_without_a_result_exits_with_one_sentence(text, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"wrong.json: .*expected"):
        read([path])


def test_put_into_replaces_the_named_part_only(tmp_path):
    page = tmp_path / "page.md"
    marks = [mark.format(name) for name in ("measured", "throughput") for mark in (BEGIN, END)]
    page.write_text("\n".join(marks))
    put_into(page, "new", "throughput")
    assert page.read_text() == "\n".join([*marks[:2], f"{marks[2]}\n\nnew\n\n{marks[3]}"])


def test_the_plot_is_a_png_with_one_panel_per_model(sample, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import plot

    plot([sample], tmp_path / "one.png")
    plot([sample] * 4, tmp_path / "four.png")
    one, four = ((tmp_path / name).read_bytes() for name in ("one.png", "four.png"))
    assert one.startswith(b"\x89PNG\r\n")
    assert 3.9 < width(four) / width(one) < 4.1


def width(png):
    return int.from_bytes(png[16:20], "big")
