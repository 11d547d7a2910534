"""The suite's bookkeeping without a GPU: parts of all files, counted outcomes."""

from __future__ import annotations

import time
from pathlib import Path

from tests.gpu import suite

HERE = Path(__file__).parent
WITHOUT_GPU = {"suite", "memory_estimate", "compiler", "launch", "streamed", "upload", "emulated", "numerics"}
WITHOUT_GPU |= {"prefill_state"}

REPORT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="test_good"><properties><property name="speed" value="9"/></properties>
</testcase>
<testcase classname="tests.gpu.test_a" name="test_bad"><failure message="no"/></testcase>
<testcase classname="tests.gpu.test_a" name="test_broken"><error message="no"/></testcase>
<testcase classname="tests.gpu.test_a" name="test_out"><skipped message="not here"/></testcase>
</testsuite></testsuites>"""


def test_every_file_of_gpu_tests_belongs_to_a_part():
    files = {path.stem.removeprefix("test_") for path in HERE.glob("test_*.py")}
    assert {name for names in suite.PARTS.values() for name in names} == files - WITHOUT_GPU


def test_a_report_becomes_counts_names_and_figures(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    outcome = suite.Outcome("ops")
    suite.read_report(path, outcome)
    assert outcome.passed == 1
    assert outcome.failed == ["test_a::test_bad", "test_a::test_broken"]
    assert outcome.skipped == ["test_a::test_out: not here"]
    assert outcome.figures == [("speed", "9")]


def test_a_part_that_takes_too_long_has_failed(monkeypatch):
    monkeypatch.setattr(suite, "pytest_command", lambda *_: ["sleep", "60"])
    assert suite.run_tests("ops", [], [], time.monotonic() + 0.2).failed == ["ops: not done within 0 s"]


def test_a_part_that_dies_without_a_report_has_failed(monkeypatch):
    monkeypatch.setattr(suite, "pytest_command", lambda *_: ["false"])
    assert suite.run_tests("ops", [], [], time.monotonic() + 60).failed == ["ops: exit code 1"]


def test_the_table_tells_failed_skipped_and_passed_parts_apart(capsys):
    outcomes = [suite.Outcome("ops", passed=2), suite.Outcome("full", skipped=["a: b"]), suite.Outcome("x", 1, ["y"])]
    suite.show(outcomes)
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[:2] for line in table] == [["ops", "PASS"], ["full", "skip"], ["x", "FAIL"]]


def test_what_is_missing_is_told_in_one_sentence_before_the_table(capsys):
    reason = "SmolLM2 is not here: the model is not in the cache"
    suite.show([suite.Outcome("models", passed=1, skipped=[f"a: {reason}", f"b: {reason}"])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "To run what was skipped: `worker pull smollm2` fetches SmolLM2."
    assert lines[-1].split()[:2] == ["models", "PASS"]


def test_every_choice_for_the_sanitizers_takes_a_test():
    tests = [test.rpartition("/")[2] for test in suite.skipped("sanitize", "").skipped]
    for choice in suite.SMALLEST:
        assert any(all(word in test for word in choice.split(" and ")) for test in tests), choice
    files = {test.partition(".")[0].removeprefix("test_") for test in tests}
    assert files == set(suite.OPS) - {"memory"}, "which launches no kernel of the project's own"
