"""Tables and plot of decode of several sequences, from results with invented figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.recorded import read
from benchmarks.reference import AT_ONCE, NAMES, REFERENCES
from benchmarks.report import BEGIN, END

pytest.importorskip("matplotlib")

from benchmarks import throughput, throughput_report
from benchmarks.throughput_report import PART, ordered, overview, report
from worker.bench.bench import SIZES, Sizes

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "bench" / "qwen2.5-0.5b.json"
COUNTS = (1, 8, 64, 100)


def invented(folder, name, commit="abc1234"):
    """Write a result of `benchmarks.throughput`: 1,000 tokens/s a sequence at 40 % of the floor."""
    result = json.loads(SAMPLE.read_text())
    del result["server_share"]
    result["commit"], result["model"]["file"] = commit, f"{name}.gguf"
    figures = [
        {"at": n, "unit": "tokens/s", "median": 1000 * n, "low": 990 * n, "high": 1020 * n, "runs": 3}
        | {"bytes": 10**9, "gb_s": 1000.0, "percent": 33.0, "floor": 2500 * n, "context": 200}
        for n in COUNTS
    ]
    result["figures"] = {PART: figures}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result))
    return path


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_rows_have_speed_step_floor_goals_and_other_engines(tmp_path):
    table = rows(report(read([invented(tmp_path, "llama-3.2-1b")])))
    assert table[2] == [
        "llama-3.2-1b", "1", "1,000 (990 to 1,020)", "1,000", "2,500", "40.0 %", "2,075", "–", "494", "895",
    ]  # fmt: skip
    assert table[4] == [
        "", "64", "64,000 (63,360 to 65,280)", "1,000", "160,000", "40.0 %", "36,000", "54,000", "28,900", "11,600",
    ]  # fmt: skip
    assert table[5][6:] == ["–"] * 4  # nobody measured 100 sequences


def test_the_overview_has_a_column_for_each_model_in_a_fixed_order(tmp_path):
    names = ["gpt-oss-20b", "other", "qwen2.5-0.5b"]
    table = rows(overview(ordered(read([invented(tmp_path, name) for name in names]))))
    assert table[0] == ["sequences", "Qwen2.5-0.5B", "GPT-OSS-20B", "other"]
    assert table[3] == ["8", "**8,000** / 5,200 / 4,000", "**8,000** / 2,200 / 880", "**8,000** / – / –"]


def test_results_of_two_commits_are_kept_apart(tmp_path):
    results = read([invented(tmp_path, "phi-3-mini"), invented(tmp_path, "gpt-oss-20b", "def5678")])
    assert report(results).count("| model |") == 2
    assert "commit abc1234" in overview(results)
    assert "commit def5678" in overview(results)


def test_one_command_writes_both_pages_and_the_plot(tmp_path, monkeypatch):
    paths = [invented(tmp_path, name) for name in NAMES]
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/performance.md"):
        (tmp_path / page).write_text((ROOT / page).read_text())
    monkeypatch.setattr(sys, "argv", ["throughput_report", *map(str, paths), "--into", str(tmp_path)])
    throughput_report.main()
    readme, performance = ((tmp_path / page).read_text() for page in ("README.md", "docs/performance.md"))
    assert "**64,000** / 25,100 / 10,400" in part(readme)
    assert len(rows(part(performance))) == 2 + 4 * len(COUNTS)
    assert "![tokens/s in all against the number of sequences](throughput.png)" in part(performance)
    assert max(map(len, part(readme).splitlines()[-3:])) <= 100
    assert (tmp_path / "docs" / "throughput.png").read_bytes().startswith(b"\x89PNG\r\n")
    for page in ("README.md", "docs/performance.md"):
        before, after = (page_text.partition(BEGIN.format(PART))[0] for page_text in
                         ((ROOT / page).read_text(), (tmp_path / page).read_text()))  # fmt: skip
        assert before == after


def test_measured_results_are_written_and_reported(tiny, tmp_path, monkeypatch, capsys):
    sizes = Sizes(16 << 20, (16,), tokens=4, first=16, answer=4, together=3)
    monkeypatch.setitem(SIZES, "cpu", sizes)
    monkeypatch.setenv("WORKER_ENGINE__BACKEND", "cpu")
    arguments = [str(tiny("llama")), "--max-running", "3", "--context", "128", "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments, "--commit", "abc1234"])
    throughput.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed] == [["llama", "N", "1"], ["llama", "N", "3"]]
    (result,) = read([tmp_path / "new" / "llama.json"])
    assert (result.commit, list(result.figures)) == ("abc1234", [PART])
    assert [row[1] for row in rows(report([result]))[2:]] == ["1", "3"]


def part(text):
    """The generated part of a page."""
    return text.partition(BEGIN.format(PART))[2].partition(END.format(PART))[0]


def test_a_result_without_figures_of_several_sequences_exits_with_one_sentence():
    with pytest.raises(SystemExit, match=r"qwen2.5-0.5b.gguf: no figures .* --max-running N"):
        ordered(read([SAMPLE]))


def test_goals_and_other_engines_are_known_for_four_models():
    assert list(AT_ONCE) == list(NAMES) == list(REFERENCES)
    for goal in AT_ONCE.values():
        assert list(goal.at_least) == [1, 8, 32, 64, 256]
        assert list(goal.vllm) == [1, 8, 32, 64, 128, 256]
        assert list(goal.llama) == [1, 8, 32, 64, 128]
        assert all(goal.at_least[count] < aim for count, aim in goal.aim.items())
