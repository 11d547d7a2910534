"""The sampler on the GPU compared with its twin: equal ids from equal logits, seeds and parameters.

The kernel rounds weights to 2^-44, the twin to f64, so a draw could differ where u is within 1e-12
of the boundary between two tokens. No case below is.
"""

from __future__ import annotations

import math
from functools import reduce
from operator import add

import numpy as np
import pytest

from worker.cpu.sampler import Sampler
from worker.errors import Internal
from worker.ops import Batch, Phase
from worker.sampling import DrawRequest, Sampling


class Bench:
    """A sampler for one vocabulary and one sequence."""

    def __init__(self, kernels, memory, size, padding=(), ends=(), processors=None):
        import cupy

        from worker.gpu.sampler import SamplerLauncher
        from worker.gpu.state import StepState

        self.kernels, self.cupy = kernels, cupy
        self.emulated = cupy.cuda.Device().attributes["MultiProcessorCount"] == 1
        processors = processors or cupy.cuda.Device().attributes["MultiProcessorCount"]
        self.state = StepState(memory, 1, 4)
        self.sampler = SamplerLauncher(memory, size, padding, ends, sequences=1, processors=processors)
        self.twin = Sampler(size, padding, ends)

    def draw(self, logits, request, position=10):
        from worker.gpu.sampler import unpack

        stream = self.cupy.cuda.get_current_stream()
        at = np.array([position], np.int32)
        batch = Batch(Phase.DECODE, at, at, (np.zeros(1, np.int32),), np.zeros(1, np.int32))
        self.state.load(batch, [request], stream)
        self.sampler.load(0, request, stream)
        return self.again(logits, request, unpack)

    def again(self, logits, request, unpack=None):
        """Draw from the state after the last draw."""
        from worker.gpu.sampler import unpack

        self.sampler.launch(self.kernels, self.cupy.asarray(logits)[None], self.state)
        return unpack(self.sampler.drawn.get()[0], request)


def random_case(rng, size):
    prompt, generated = rng.integers(0, size, 5).tolist(), rng.integers(0, size, rng.integers(0, 20)).tolist()
    sampling = Sampling(
        temperature=float(rng.choice([0, 0.3, 1, 2])),
        top_k=int(rng.choice([0, 1, 3, 40, size - 1, size])),
        top_p=float(rng.choice([1, 1, 0.9, 0.5, 0.0, 0.999])),
        min_p=float(rng.choice([0, 0, 0.05, 1.0])),
        repetition_penalty=float(rng.choice([1, 1.3])),
        frequency_penalty=float(rng.choice([0, 0.5])),
        presence_penalty=float(rng.choice([0, -0.5])),
        penalize_prompt=bool(rng.integers(2)),
        logit_bias={int(rng.integers(size)): float(rng.normal() * 5)} if rng.integers(2) else {},
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        min_tokens=int(rng.choice([0, 30])),
        stop_token_ids=frozenset(rng.integers(0, size, 2).tolist()) if size > 10 and rng.integers(2) else frozenset(),
        logprobs=[None, 0, 5, 20][rng.integers(4)],
    )
    return DrawRequest(sampling, len(generated), prompt, generated)


def random_logits(rng, size):
    logits = (rng.normal(size=size) * rng.choice([0.1, 1, 4])).astype(np.float32)
    return np.round(logits * 2) / np.float32(2) if rng.integers(3) == 0 else logits


def same(draw, expected):
    assert draw.id == expected.id
    if expected.logprob is not None:
        assert [token for token, _ in draw.top] == [token for token, _ in expected.top]
        np.testing.assert_allclose([p for _, p in draw.top], [p for _, p in expected.top], atol=1e-9)
        assert draw.logprob == pytest.approx(expected.logprob, abs=1e-9)


@pytest.mark.parametrize(("size", "cases"), [(5, 60), (320, 150), (3001, 150), (49152, 60), (151936, 40), (201088, 40)])
def test_draws_equal_those_of_the_twin(kernels, memory, size, cases):
    rng = np.random.default_rng(size)
    padding = set(rng.integers(0, size, 2).tolist()) if size > 10 else set()
    bench = Bench(kernels, memory, size, padding, rng.integers(0, size, 3).tolist() if size > 10 else [1])
    for _ in range(cases):
        logits, request = random_logits(rng, size), random_case(rng, size)
        same(bench.draw(logits, request), bench.twin.draw(logits, request))


@pytest.mark.parametrize("processors", [1, 3, 64])
def test_a_device_of_fewer_multiprocessors_draws_the_same_bits(kernels, memory, processors):
    rng = np.random.default_rng(5)
    bench, whole = (Bench(kernels, memory, 4999, processors=n) for n in (processors, 132))
    for _ in range(20):
        logits, request = random_logits(rng, 4999), random_case(rng, 4999)
        assert bench.draw(logits, request) == whole.draw(logits, request)


@pytest.mark.parametrize("size", [100, 4999])
def test_log_probabilities_are_sums_over_fixed_slices_whatever_the_grid(kernels, memory, size):
    bench = Bench(kernels, memory, size)
    logits = random_logits(np.random.default_rng(2), size)
    drawn = bench.draw(logits, DrawRequest(Sampling(temperature=0, logprobs=1), 0, [], []))
    expected = float(logits.max()) - float(logits.max()) - math.log(sum_in_slices(logits))
    assert drawn.logprob == (expected if bench.emulated else pytest.approx(expected, abs=1e-14))


def sum_in_slices(logits):
    """Sum exp(l - max l) as sample.cu does: by thread, pairwise, then over 128 slices."""
    each, total = -(-len(logits) // 128), 0.0
    weights = [math.exp(float(x) - float(logits.max())) for x in logits]
    for at in range(0, 128 * each, each):
        sums = [reduce(add, weights[at : at + each][thread::256], 0.0) for thread in range(256)]
        while len(sums) > 1:
            sums = [a + b for a, b in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True)]
        total += sums[0]
    return total


def test_the_device_advances_its_state_as_the_host_would(kernels, memory):
    rng = np.random.default_rng(3)
    sampling = Sampling(temperature=1.0, seed=11, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=2)
    bench, generated = Bench(kernels, memory, 320), []
    for index in range(40):
        logits = random_logits(rng, 320)
        request = DrawRequest(sampling, index, [1, 2], generated)
        draw = bench.draw(logits, request) if index == 0 else bench.again(logits, request)
        same(draw, bench.twin.draw(logits, request))
        generated.append(draw.id)
        assert int(bench.state.tokens.get()[0]) == draw.id
        assert int(bench.state.positions.get()[0]) == 11 + index


def test_stop_tokens_are_masked_up_to_min_tokens_and_only_for_their_sequence(kernels, memory):
    bench, logits = Bench(kernels, memory, 320, ends=[3]), np.zeros(320, np.float32)
    logits[[3, 5, 7]] = 9, 8, 7
    stops = Sampling(temperature=0, min_tokens=2, stop_token_ids=frozenset({5}))
    drawn = [bench.draw(logits, DrawRequest(stops, 0, [1], []))]
    drawn += [bench.again(logits, DrawRequest(stops, index, [1], [])) for index in (1, 2)]
    drawn += [bench.draw(logits, DrawRequest(Sampling(temperature=0, min_tokens=9), 0, [1], []))]
    assert [draw.id for draw in drawn] == [7, 7, 3, 5]


def test_a_forced_token_is_returned_without_a_draw(kernels, memory):
    bench = Bench(kernels, memory, 320)
    request = DrawRequest(Sampling(), 4, [1], [2, 3, 4, 5], forced=77)
    assert bench.draw(np.full(320, np.nan, np.float32), request).id == 77
    assert int(bench.state.tokens.get()[0]) == 77


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_finite_draw_no_token(kernels, memory, temperature, broken):
    bench = Bench(kernels, memory, 320)
    logits = np.zeros(320, np.float32)
    logits[200] = broken
    with pytest.raises(Internal, match="not finite"):
        bench.draw(logits, DrawRequest(Sampling(temperature=temperature), 0, [1], []))
    request = DrawRequest(Sampling(temperature=temperature, seed=1), 0, [1], [])
    fine = np.arange(320, dtype=np.float32) / 32
    same(bench.draw(fine, request), bench.twin.draw(fine, request))


def test_a_padding_row_of_nan_is_ignored(kernels, memory):
    bench = Bench(kernels, memory, 320, padding=[319])
    logits = np.zeros(320, np.float32)
    logits[319] = np.nan
    request = DrawRequest(Sampling(temperature=0), 0, [1], [])
    assert bench.draw(logits, request).id == 0
