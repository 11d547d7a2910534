"""The seed determines faults and workload."""

from __future__ import annotations

from collections import Counter

from tests.chaos.network import NETWORK_FAULTS
from tests.chaos.schedule import FAULT_WEIGHTS, schedule
from tests.chaos.workload import POISON, echo_cases, tiny_cases


def test_a_seed_determines_the_schedule():
    assert schedule(7, 180, 2.2) == schedule(7, 180, 2.2)
    assert schedule(7, 180, 2.2) != schedule(8, 180, 2.2)


def test_three_minutes_have_every_kind_of_fault():
    for seed in range(20):
        planned = schedule(seed, 155, 2.2)
        assert {fault.kind for fault in planned} == set(FAULT_WEIGHTS)
        assert [fault.at for fault in planned] == sorted(fault.at for fault in planned)
        assert planned[-1].at < 155


def test_two_minutes_have_every_kind_of_fault_and_lose_the_last_second_three_times():
    for seed in range(50):
        kinds = Counter(fault.kind for fault in schedule(seed, 95, 2.2))
        assert set(kinds) == set(FAULT_WEIGHTS)
        assert kinds["lost second"] >= 3
        assert kinds["kill"] >= 5


def test_the_network_has_faults_of_its_own_of_every_kind():
    for seed in range(20):
        planned = schedule(seed, 155, 3.0, NETWORK_FAULTS)
        assert {fault.kind for fault in planned} == set(NETWORK_FAULTS)
        assert 30 < len(planned) < 80


def test_pauses_exceed_the_lease_and_end_before_the_stall_timeout():
    pauses = [fault.pause for seed in range(20) for fault in schedule(seed, 180, 2.2)]
    assert min(pauses) > 1.2
    assert max(pauses) < 3


def test_a_seed_determines_cases_with_varied_answers(tmp_path):
    for cases in (tiny_cases(tmp_path, 3, 8), echo_cases(3, 8)):
        assert {case.finish_reason for case in cases} >= {"length", "stop_sequence"}
        for case in cases:
            assert len(case.ids) == len(case.texts) > 0
            assert case.stop_sequence is None or case.stop_sequence not in case.text
            assert tuple(case.fields.get("prompt_tokens", ()))[: len(POISON)] != POISON
    assert tiny_cases(tmp_path, 3, 3)[2] == tiny_cases(tmp_path, 3, 8)[2]
