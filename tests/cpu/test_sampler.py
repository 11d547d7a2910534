"""The sampler's definition: every parameter by hand, and the distribution of the draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.cpu.sampler import Sampler, distribution, log_softmax, philox4x32, uniform
from worker.errors import Internal
from worker.sampling import DrawRequest, Sampling

KAT = json.loads((Path(__file__).parents[1] / "data" / "philox4x32_10.json").read_text())


def uint32s(text):
    return tuple(int(each, 16) for each in text) if isinstance(text, list) else text


@pytest.mark.parametrize("vector", KAT["vectors"])
def test_philox_gives_random123s_known_answers(vector):
    assert philox4x32(uint32s(vector["counter"]), uint32s(vector["key"])) == uint32s(vector["result"])


def test_a_draws_number_depends_on_seed_and_index_alone():
    seed = 0x299F31D0A4093822
    x0 = philox4x32((5, 0, 0, 0), (0xA4093822, 0x299F31D0))[0]
    assert uniform(seed, 5) == (x0 >> 8) / 2**24
    assert len({uniform(seed, i) for i in range(1000)}) == 1000
    assert uniform(2**64 - 1, 0) != uniform(2**32 - 1, 0)


def logits_of(*values):
    return np.array(values, np.float32)


def draw(logits, sampling, *, index=0, generated=(), prompt=(), padding=(), ends=(), forced=None):
    sampler = Sampler(len(logits), padding, ends)
    return sampler.draw(logits, DrawRequest(sampling, index, list(prompt), list(generated), forced))


def test_greedy_takes_the_highest_and_the_lower_id_among_equals():
    assert draw(logits_of(1, 5, 5, 2), Sampling(temperature=0)).id == 1


def test_drawing_does_not_modify_the_logits():
    logits = logits_of(1, 2, 3, 4)
    draw(logits, Sampling(logit_bias={0: 9.0}, repetition_penalty=2.0), generated=[3], padding=[1])
    assert logits.tolist() == [1, 2, 3, 4]


def test_padding_rows_are_never_drawn_at_any_temperature():
    logits = logits_of(0, 50, 0, 60)
    assert draw(logits, Sampling(temperature=0), padding=[1, 3]).id == 0
    drawn = {draw(logits, Sampling(seed=s, temperature=2.0), padding=[1, 3]).id for s in range(50)}
    assert drawn == {0, 2}


def test_end_tokens_are_masked_before_min_tokens_only():
    logits, sampling = logits_of(0, 9, 1), Sampling(temperature=0, min_tokens=3)
    assert [draw(logits, sampling, index=i, ends=[1]).id for i in range(5)] == [2, 2, 2, 1, 1]


def test_stop_tokens_are_masked_before_min_tokens_only():
    sampling = Sampling(temperature=0, min_tokens=2, stop_token_ids=frozenset({1, 2}))
    assert [draw(logits_of(0, 9, 1), sampling, index=i).id for i in range(4)] == [0, 0, 1, 1]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once_a_token():
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    assert draw(logits_of(4, 3, -1), sampling, generated=[0, 0, 0]).id == 1  # 4 → 2 once, not 0.5
    assert draw(logits_of(-2, -1, -9), sampling, generated=[1]).id == 0  # -1 → -2: a tie, the lower id
    assert draw(logits_of(-2, -1.5, -9), sampling, generated=[1]).id == 0


def test_frequency_counts_occurrences_and_presence_does_not():
    logits = logits_of(5, 4, 0)
    assert draw(logits, Sampling(temperature=0, frequency_penalty=0.6), generated=[0]).id == 0
    assert draw(logits, Sampling(temperature=0, frequency_penalty=0.6), generated=[0, 0]).id == 1
    assert draw(logits, Sampling(temperature=0, presence_penalty=0.6), generated=[0, 0, 0]).id == 0
    assert draw(logits, Sampling(temperature=0, presence_penalty=1.1), generated=[0]).id == 1
    assert draw(logits, Sampling(temperature=0, presence_penalty=-2), generated=[1]).id == 1


def test_penalties_count_the_prompt_only_with_penalize_prompt():
    logits = logits_of(5, 4.9)
    assert draw(logits, Sampling(temperature=0, presence_penalty=1), prompt=[0]).id == 0
    assert draw(logits, Sampling(temperature=0, presence_penalty=1, penalize_prompt=True), prompt=[0]).id == 1


def test_bias_comes_before_the_repetition_penalty():
    sampling = Sampling(temperature=0, logit_bias={0: 3.0}, repetition_penalty=2.0)
    # (-1 + 3) / 2 = 1 exceeds 0.5. The other order also gives 1 (-2 + 3): the next cases decide.
    assert draw(logits_of(-1, 0.5), sampling, generated=[0]).id == 0
    assert draw(logits_of(1, 1.9), sampling, generated=[0]).id == 0  # (1 + 3) / 2 = 2; 1 / 2 + 3 is 3.5
    assert draw(logits_of(1, 2.1), sampling, generated=[0]).id == 1


def kept(logits, **params):
    ids, probs = distribution(logits.astype(np.float64), Sampling(**params))
    assert probs.sum() == pytest.approx(1, abs=1e-12)
    return ids.tolist()


def test_top_k_keeps_the_likeliest_and_lower_ids_among_equals():
    assert kept(logits_of(1, 3, 3, 3, 0), top_k=2) == [1, 2]
    assert kept(logits_of(1, 3, 3, 3, 0), top_k=0) == [0, 1, 2, 3, 4]
    assert kept(logits_of(1, 3), top_k=99) == [0, 1]


def test_top_p_keeps_the_fewest_tokens_of_the_whole_vocabulary_that_reach_it():
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    assert kept(logits, top_p=0.4) == [3]
    assert kept(logits, top_p=0.41) == [2, 3]
    assert kept(logits, top_p=0.95) == [0, 1, 2, 3]
    assert kept(logits, top_p=0.0) == [3]
    far = np.full(5000, -20.0)
    far[4321] = 5.0  # a nucleus over the first part of the vocabulary would miss it
    assert kept(far, top_p=0.5) == [4321]


def test_min_p_is_relative_to_the_likeliest():
    logits = np.log(np.array([0.5, 0.26, 0.24]))
    assert kept(logits, min_p=0.5) == [0, 1]
    assert kept(logits, min_p=1.0) == [0]


def test_temperature_comes_before_top_p():
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    assert kept(logits, top_p=0.75) == [0, 1]
    assert kept(logits, top_p=0.75, temperature=0.25) == [0]
    assert kept(logits, top_p=0.75, temperature=2.0) == [0, 1, 2]


def test_a_tiny_temperature_is_greedy():
    assert draw(logits_of(1, 2, 3), Sampling(temperature=1e-320, seed=4)).id == 2


@given(
    st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=60),
    st.floats(0.01, 2),
    st.integers(0, 70),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**64 - 1),
)
def test_every_draw_is_a_kept_token_and_probabilities_sum_to_one(values, temperature, top_k, top_p, min_p, seed):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    logits = np.array(values, np.float32)
    ids, probs = distribution(logits.astype(np.float64), sampling)
    assert abs(probs.sum() - 1) < 1e-9
    assert int(np.argmax(logits)) in ids
    assert draw(logits, sampling).id in ids
    assert draw(logits, sampling).id == draw(logits, sampling).id


def test_draws_follow_the_distribution():
    logits, sampling = logits_of(0, 1, 2, -1), Sampling(temperature=0.8, seed=11)
    sampler, n = Sampler(4, (), ()), 20_000
    counts = np.bincount([sampler.draw(logits, DrawRequest(sampling, i, [], [])).id for i in range(n)], minlength=4)
    expected = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum() * n
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_log_probabilities_are_of_the_raw_logits_over_all_rows():
    logits = logits_of(1, 2, 3, 4)
    plain = log_softmax(logits)
    assert np.exp(plain).sum() == pytest.approx(1, abs=1e-12)
    sampling = Sampling(temperature=0, logit_bias={0: 100.0}, logprobs=2)
    result = draw(logits, sampling, padding=[3])
    assert result.id == 0
    assert result.logprob == pytest.approx(plain[0])
    assert result.top == ((3, pytest.approx(plain[3])), (2, pytest.approx(plain[2])))


def test_alternatives_are_sorted_and_logprobs_zero_gives_an_empty_list():
    assert draw(logits_of(2, 7, 7), Sampling(logprobs=0)).top == ()
    assert [i for i, _ in draw(logits_of(2, 7, 7), Sampling(logprobs=20)).top] == [1, 2, 0]
    assert draw(logits_of(2, 7), Sampling()).top is None


def test_a_forced_token_is_returned_without_a_draw():
    assert draw(logits_of(9, 0), Sampling(), forced=1).id == 1


def test_logits_that_are_not_finite_raise_an_error():
    with pytest.raises(Internal, match="finite"):
        draw(logits_of(1, float("nan")), Sampling(temperature=0))
