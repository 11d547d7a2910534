"""The same job gives the same ids, in repeated runs and in a second process after SIGKILL.

3 seeds × 5 prompts × 10 runs of 64 tokens at temperatures 0 and 0.8, on a tiny gpt-oss (experts,
sinks, windows) and on SmolLM2. `test_runner.py` covers chunks, blocks and other sequences,
`test_full_size.py` one seed on each full-size file.
"""

from __future__ import annotations

import signal

import numpy as np
import pytest

from tests.gpu.served import Child, answer, load
from worker.sampling import Sampling

SEEDS, LENGTHS, RUNS, TOKENS = (1, 77, 2**63 + 5), (3, 16, 49, 130, 260), 10, 64
MODELS = ("gpt-oss", "smollm2")


def prompts(vocab):
    return [np.random.default_rng(length).integers(0, vocab, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=MODELS)
def path(request, gpu, tiny):
    """A model's file; SmolLM2's tests are skipped if it was not pulled."""
    return request.getfixturevalue("smollm2_here") if request.param == "smollm2" else tiny(request.param)


@pytest.fixture(scope="module")
def loaded(path):
    return load(path)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ten_runs_of_every_seed_and_prompt_draw_the_same_ids(loaded, temperature):
    jobs = [(seed, prompt) for seed in SEEDS for prompt in prompts(loaded.vocab_size)]

    def all_answers():
        return [answer(loaded, prompt, Sampling(temperature=temperature, seed=seed), TOKENS) for seed, prompt in jobs]

    first = all_answers()
    assert all(len(ids) == TOKENS for ids in first)
    for _ in range(RUNS - 1):
        assert all_answers() == first
    different_seeds = {tuple(ids) for ids in first[:: len(LENGTHS)]}
    assert len(different_seeds) == (1 if temperature == 0 else len(SEEDS))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_killed_worker_s_job_continues_in_a_second_process(path, loaded, temperature):
    prompt, seed = prompts(loaded.vocab_size)[3], SEEDS[1]
    whole = answer(loaded, prompt, Sampling(temperature=temperature, seed=seed), TOKENS)
    first = Child(path, prompt, seed=seed, temperature=temperature, tokens=TOKENS, pause=23)
    published = first.read(23)
    assert first.kill() == -signal.SIGKILL
    second = Child(path, prompt, seed=seed, temperature=temperature, tokens=TOKENS, replay=published)
    code, rest, stderr = second.finish()
    assert code == 0, stderr
    assert published + rest == whole
