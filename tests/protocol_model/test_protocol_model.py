"""The protocol holds in every interleaving within bounds, and each missing rule has a counterexample."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.chaos import unfenced
from tests.jobs.memory_streams import MemoryStreams
from tests.jobs.servers import Server
from tests.protocol_model import __main__ as command
from tests.protocol_model.automaton import stopped_clocks
from tests.protocol_model.conformance import differences
from tests.protocol_model.explorer import Bounds, Explorer, Faults, Violation
from tests.protocol_model.mutants import (
    MUTANTS,
    AppendsAnywhere,
    IgnoresTheAttempt,
    RenewSteals,
    SettlesUnverified,
    TakesWithoutEpoch,
)
from worker.jobs.redis_streams import RedisStreams

SCENARIOS = {
    "two faults of workers": Bounds(1, Faults(pauses=2, crashes=2, lost_replies=2, drains=1, in_all=2)),
    "a cancel and a fault": Bounds(1, Faults(cancels=1, pauses=1, crashes=1, lost_replies=1, in_all=2)),
    "a lost second": Bounds(1, Faults(lost_seconds=1, in_all=1)),
    "two entries and a pause": Bounds(1, Faults(submissions=1, pauses=1, in_all=2)),
    "two tokens and a pause": Bounds(2, Faults(pauses=1, in_all=1)),
}
PROBLEMS: dict[type[MemoryStreams], str] = {
    AppendsAnywhere: "2-1 has epoch 1",
    IgnoresTheAttempt: "token indices are [0, 1, 1]",
    SettlesUnverified: "there is no terminal event",
    RenewSteals: "a worker was fenced without one",
    TakesWithoutEpoch: "a second started",
}


@pytest.fixture(autouse=True)
def clocks() -> Iterator[None]:
    with stopped_clocks():
        yield


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_interleaving_keeps_the_protocol(name: str) -> None:
    explorer = Explorer(SCENARIOS[name])
    explorer.run()
    assert len(explorer.came_from) > 1000


def test_the_faults_reach_every_kind_of_ending_and_later_epochs() -> None:
    explorer = Explorer(Bounds(1, Faults(cancels=1, abandons=2, in_all=2)))
    explorer.run()
    states = [explorer.facts(state.server).state for state in explorer.came_from]
    endings = {(state.get("state"), state.get("error")) for state in states if "ended_ms" in state}
    assert endings == {("end", None), ("error", "CANCELLED"), ("error", "DEAD_LETTERED")}
    assert {state.get("epoch", "0") for state in states} == {"0", "1", "2", "3"}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_server_without_one_rule_has_a_counterexample(mutant: type[MemoryStreams]) -> None:
    with pytest.raises(Violation) as found:
        Explorer(MUTANTS[mutant], mutant).run(120)
    assert PROBLEMS.get(mutant, "") in found.value.problem
    assert found.value.trace


def test_a_counterexample_lists_who_called_what_and_the_reply() -> None:
    with pytest.raises(Violation) as found:
        Explorer(MUTANTS[SettlesUnverified], SettlesUnverified).run(120)
    trace = "\n".join(found.value.trace)
    assert "w1           take: take(a, w1 entry 1000000-0 after 0-0 epoch 1: started) -> TAKEN" in trace
    assert "server       the server lost writes" in trace
    assert "w1 alone     settle: settle(default, 1000000-0, None, a) -> True" in trace


def test_no_fault_leaves_few_states() -> None:
    explorer = Explorer(Bounds())
    explorer.run()
    assert {explorer.facts(state.server).epoch for state in explorer.came_from} == {0, 1}


@pytest.fixture(scope="module")
def explored() -> Explorer:
    with stopped_clocks():
        bounds = Bounds(1, Faults(pauses=1, crashes=1, lost_replies=1, cancels=1, abandons=1, submissions=1, in_all=1))
        explorer = Explorer(bounds)
        explorer.run()
    return explorer


def test_a_real_server_replies_to_every_explored_call_as_the_model(explored: Explorer, server: Server) -> None:
    compared, found = differences(explored, server.url, at_most=400)
    assert not found, "\n".join(found)
    assert compared > 1000


def test_a_real_server_after_lost_writes_replies_as_the_model(server: Server) -> None:
    explorer = Explorer(SCENARIOS["a lost second"])
    explorer.run()
    compared, found = differences(explorer, server.url, at_most=300)
    assert not found, "\n".join(found)
    assert compared > 500


@pytest.mark.parametrize("call", ["append", "renew"])
def test_a_real_server_without_a_rule_differs_from_the_model(explored: Explorer, server: Server, call: str) -> None:
    streams = type("Streams", (RedisStreams,), {call: getattr(unfenced, call)})
    _, found = differences(explored, server.url, streams.from_url)
    assert any(f"{call}(" in each for each in found)


def test_the_command_prints_figures_or_a_counterexample(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["protocol_model", "--tokens", "1"])
    assert command.main() == 0
    assert "states of the server" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["protocol_model", "--mutant", "TakesWithoutEpoch", "--pauses", "1"])
    assert command.main() == 1
    assert "a second started" in capsys.readouterr().out
