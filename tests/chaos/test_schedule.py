"""The seed decides what is done and what is asked."""

from __future__ import annotations

from tests.chaos.questions import POISON, echo_questions, tiny_questions
from tests.chaos.schedule import BLOWS, schedule


def test_a_seed_is_a_schedule():
    assert schedule(7, 180, 2.2) == schedule(7, 180, 2.2)
    assert schedule(7, 180, 2.2) != schedule(8, 180, 2.2)


def test_three_minutes_bring_every_kind_of_blow():
    for seed in range(20):
        planned = schedule(seed, 155, 2.2)
        assert {blow.kind for blow in planned} >= {"kill", "pause", "term"}
        assert [blow.at for blow in planned] == sorted(blow.at for blow in planned)
        assert planned[-1].at < 155
    assert {blow.kind for seed in range(20) for blow in schedule(seed, 155, 2.2)} == set(BLOWS)


def test_pauses_outlast_the_lease_and_end_before_a_worker_counts_as_stuck():
    pauses = [blow.pause for seed in range(20) for blow in schedule(seed, 180, 2.2)]
    assert min(pauses) > 1.2
    assert max(pauses) < 3


def test_a_seed_is_a_set_of_questions_with_answers_worth_asking_for(tmp_path):
    for questions in (tiny_questions(tmp_path, 3, 8), echo_questions(3, 8)):
        assert {asked.finish_reason for asked in questions} >= {"length", "stop_sequence"}
        for asked in questions:
            assert len(asked.ids) == len(asked.texts) > 0
            assert asked.stop_sequence is None or asked.stop_sequence not in asked.text
            assert tuple(asked.fields.get("prompt_tokens", ()))[: len(POISON)] != POISON
    assert tiny_questions(tmp_path, 3, 3)[2] == tiny_questions(tmp_path, 3, 8)[2]
