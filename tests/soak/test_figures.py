"""What finds a violation: bounds, checks of a reader, growth between two counts; and the command."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from tests.soak import __main__ as command
from tests.soak.figures import Figure, none_of, percentile, table
from tests.soak.jobs import EchoJob, Reading
from tests.soak.processes import Census, Growth

JOB = EchoJob("j", 5)


@pytest.mark.parametrize(
    ("figure", "violation"),
    [
        (Figure("cancel, p99", 99.5, "ms", most=100), None),
        (Figure("cancel, p99", 100.5, "ms", most=100), "cancel, p99: 100 ms; expected at most 100 ms"),
        (Figure("time", 1.25, "s", most=1), "time: 1.25 s; expected at most 1 s"),
        (Figure("jobs", 9_999, least=10_000), "jobs: 9,999; expected at least 10,000"),
        (Figure("nothing measured", float("nan"), most=1), "nothing measured: nan; expected at most 1"),
        (Figure("for information", 7), None),
        (none_of("faults", []), None),
        (none_of("faults", ["a", "b"]), "faults (a): 2; expected at most 0"),
    ],
)
def test_a_value_outside_of_its_bounds_is_one_sentence(figure, violation):
    assert figure.violation == violation


def test_a_table_has_a_row_for_each_figure():
    rows = table([("cancels", [Figure("p99", 120, "ms", most=100), Figure("all", 5, least=5)])]).splitlines()
    assert rows[2:] == [
        "| cancels | p99 | 120 ms | ≤ 100 | **violated** |",
        "| cancels | all | 5 | ≥ 5 | holds |",
    ]


def test_percentiles_of_few_values_are_within_them():
    assert percentile([3.0], 99) == 3.0
    assert percentile(range(101), 99) == 99
    assert percentile(range(101), 50) == 50


@pytest.mark.parametrize(
    ("indices", "text", "ending", "problems"),
    [
        ([0, 1, 2, 3, 4], "j.j.j", "end", 0),
        ([0, 1, 2, 2, 3, 4], "j.jj.j", "end", 2),
        ([0, 1, 3, 4], "j..j", "end", 2),
        ([0, 1, 2, 3, 4], "j.j.x", "end", 1),
        ([0, 1, 2], "j.j", "end", 1),
        ([0, 1, 2], "j.j", "CANCELLED", 2),
    ],
)
def test_a_reader_with_a_lost_a_repeated_or_a_wrong_token_is_a_problem(indices, text, ending, problems):
    assert len(Reading(indices, list(text), ending).problems(JOB)) == problems


def test_a_cancelled_job_may_have_a_beginning_of_its_answer():
    assert Reading([0, 1], list("j."), "CANCELLED").problems(JOB, "CANCELLED") == []
    assert len(Reading([0, 1], list("jj"), "CANCELLED").problems(JOB, "CANCELLED")) == 1
    assert len(Reading([0, 1], list("j."), "end").problems(JOB, "CANCELLED")) == 1


def test_growth_between_two_counts_is_a_violation():
    growth = Growth(rss_mb=4, objects=100, connections=2)
    first = Census(80, 20, 5, 9, Counter({"dict": 1000, "list": 500}))
    same = Census(83, 22, 5, 9, Counter({"dict": 1050, "list": 400}))
    leaking = Census(85, 23, 6, 12, Counter({"dict": 1101, "list": 500}))
    assert [figure.violation for figure in growth.figures("jobs 1 to 9", first, same) if figure.violation] == []
    violations = [figure.violation for figure in growth.figures("jobs 1 to 9", first, leaking) if figure.violation]
    assert [each.partition(",")[0] for each in violations] == [
        "growth of RSS",
        "growth in objects",
        "more file descriptors",
        "more threads",
        "more tasks",
    ]
    assert "(101 dict)" in violations[1]


@pytest.mark.parametrize(("value", "code"), [(1, 0), (2, 1)])
def test_the_command_prints_a_table_and_ends_with_1_after_a_violation(value, code, monkeypatch, capsys):
    async def run(plan, folder):
        assert folder.is_dir()
        return [Figure("value", plan, most=1)]

    monkeypatch.setattr(command.importlib, "import_module", lambda _: SimpleNamespace(run=run, FULL=value, SHORT=0))
    monkeypatch.setattr(sys, "argv", ["tests.soak", "memory"])
    assert command.main() == code
    output = capsys.readouterr().out
    assert f"| memory | value | {value} | ≤ 1 |" in output
    assert ("VIOLATION: memory: value: 2; expected at most 1" in output) == bool(code)


def test_a_scenario_that_raises_is_a_violation(monkeypatch, capsys):
    async def run(plan, folder):
        raise RuntimeError("the server did not start")

    monkeypatch.setattr(command.importlib, "import_module", lambda _: SimpleNamespace(run=run, FULL=0, SHORT=0))
    monkeypatch.setattr(sys, "argv", ["tests.soak", "memory"])
    assert command.main() == 1
    assert "the scenario raised RuntimeError: the server did not start" in capsys.readouterr().out


def test_an_unknown_name_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tests.soak", "memry"])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    assert "there is no scenario memry; expected some of backlog, memory, " in capsys.readouterr().err
