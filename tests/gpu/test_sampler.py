"""The sampler on the GPU compared with its twin: equal ids from equal logits, seeds and parameters.

The kernel rounds weights to 2^-44, the twin to f64, so a draw could differ where u is within 1e-12
of the boundary between two tokens. No case below is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from operator import add
from types import SimpleNamespace

import numpy as np
import pytest

from tests.grammars import packed
from worker.cpu.sampler import Sampler
from worker.errors import Internal
from worker.sampling import DrawRequest, Sampling

NO_LIMIT = 2**31 - 1
GRAMMAR = SimpleNamespace()
"""Stands for the grammar of a request that has a mask."""


class GivenMask:
    """`worker.token_masks.SlotMask` of one draw."""

    error = None

    def __init__(self, words):
        self.words = words

    def fill(self, words):
        words[:] = self.words


class Bench:
    """A sampler for one vocabulary, and the state of some slots."""

    def __init__(self, kernels, memory, size, padding=(), ends=(), processors=None, slots=1, rows=None):
        import cupy

        from worker.gpu.memory import Purpose
        from worker.gpu.sampler import SamplerLauncher
        from worker.gpu.state import ENDS, REQUEST

        def array(*shape, dtype=np.int32):
            slab = memory.reserve(math.prod(shape) * np.dtype(dtype).itemsize, Purpose.WORKSPACE)
            made = slab.array(shape, dtype)
            made.fill(-1 if dtype == np.int32 else 0)
            return made

        self.kernels, self.cupy = kernels, cupy
        self.emulated = cupy.cuda.Device().attributes["MultiProcessorCount"] == 1
        device = cupy.cuda.Device().attributes
        processors, max_shared = processors or device["MultiProcessorCount"], device["MaxSharedMemoryPerBlockOptin"]
        requests = array(slots, REQUEST.itemsize, dtype=np.uint8)
        self.state = SimpleNamespace(tokens=array(slots), positions=array(slots), requests=requests)
        self.state.ends, self.state.limits = array(slots, ENDS), array(slots)
        self.row_slots = array(rows or slots)
        grid = {"processors": processors, "max_shared": max_shared}
        self.sampler = SamplerLauncher(memory, size, padding, ends, sequences=slots, rows=rows, **grid)
        self.twin = Sampler(size, padding, ends)

    def start(self, slot, request, position=10, ends=(), limit=NO_LIMIT):
        """Begin a sequence in a slot."""
        from worker.gpu.state import ENDS, REQUEST, pack

        packed = np.array([pack(request)], REQUEST).view(np.uint8)
        padded = np.array([*ends, *[-1] * (ENDS - len(ends))], np.int32)
        values = ((self.state.positions, position), (self.state.requests, packed), (self.state.limits, limit))
        for array, value in (*values, (self.state.ends, padded)):
            array[slot : slot + 1].set(np.asarray(value, array.dtype).reshape(array[slot : slot + 1].shape))
        self.sampler.load(slot, request, self.cupy.cuda.get_current_stream())

    def launch(self, logits, row_slots, masks=None):
        """Draw for rows of slots: the raw results, and their ids. `masks` [V] bool by row."""
        from worker.gpu.sampler import DRAWN

        self.row_slots[: len(row_slots)].set(np.array(row_slots, np.int32))
        self.sampler.drawn.fill(0x55)
        device_logits = self.cupy.asarray(np.asarray(logits, np.float32))
        self.sampler.launch(self.kernels, device_logits, self.state, self.row_slots[: len(row_slots)])
        if masks:
            self.load_masks(masks)
            self.sampler.launch(self.kernels, device_logits, self.state, self.row_slots[: len(row_slots)], masked=True)
        raw = self.sampler.drawn.get()[: len(row_slots)]
        return raw, raw.view(DRAWN)["id"][:, 0].tolist()

    def load_masks(self, masks):
        given = {row: GivenMask(words) for row, words in masks.items()}
        self.sampler.masks.load(given, self.cupy.cuda.get_current_stream())

    def draw(self, logits, request, position=10):
        self.start(0, request, position)
        return self.again(logits, request)

    def again(self, logits, request):
        """Draw from the state after the last draw."""
        from worker.gpu.sampler import unpack

        masked = request.allowed is not None and request.forced is None
        if masked:
            self.load_masks({0: request.allowed})
        self.sampler.launch(self.kernels, self.cupy.asarray(logits)[None], self.state, masked=masked)
        return unpack(self.sampler.drawn.get()[0], request)

    def positions(self):
        return self.state.positions.get().tolist()


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


def with_mask(rng, size, request, masked):
    """The request, or in three of four cases with a mask of few, of half or of nearly all ids.

    One of them is neither in `masked`, the padding rows and end tokens, nor a stop token.
    """
    kind = rng.integers(4)
    if not kind:
        return request
    allowed = rng.random(size) < (0, 2 / size, 0.5, 1 - 2 / size)[kind]
    allowed[rng.choice(np.setdiff1d(np.arange(size), [*masked, *request.sampling.stop_token_ids]))] = True
    sampling = replace(request.sampling, grammar=GRAMMAR)
    return replace(request, sampling=sampling, allowed=packed(allowed, -(-size // 32)))


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


@pytest.mark.parametrize(("size", "cases"), [(5, 60), (320, 100), (3001, 100), (151936, 30), (201088, 30)])
def test_draws_with_masks_equal_those_of_the_twin(kernels, memory, size, cases):
    rng = np.random.default_rng(size + 1)
    padding = set(rng.integers(0, size, 2).tolist()) if size > 10 else set()
    ends = rng.integers(0, size, 3).tolist() if size > 10 else [1]
    bench = Bench(kernels, memory, size, padding, ends)
    for _ in range(cases):
        logits, request = random_logits(rng, size), with_mask(rng, size, random_case(rng, size), [*padding, *ends])
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
    """Sum exp(l - max l) as slice_sums.cuh does: by thread, pairwise, then over 128 slices."""
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


def test_ids_that_a_mask_denies_are_not_drawn_whatever_their_logits(kernels, memory):
    logits = np.zeros(70, np.float32)
    logits[[3, 64]] = np.nan, np.inf
    for temperature in (0.0, 1.0):
        bench = Bench(kernels, memory, 70)
        sampling = Sampling(temperature=temperature, grammar=GRAMMAR, logit_bias={5: 99.0})
        request = DrawRequest(sampling, 0, [], [], allowed=packed(np.isin(np.arange(70), [7]), 3))
        assert bench.draw(logits, request).id == 7


def test_a_mask_without_ids_draws_no_token_and_stops_the_slot(kernels, memory):
    for temperature in (0.0, 1.0):
        bench = Bench(kernels, memory, 320)
        sampling = Sampling(temperature=temperature, grammar=GRAMMAR)
        with pytest.raises(Internal):
            bench.draw(np.zeros(320, np.float32), DrawRequest(sampling, 0, [], [], allowed=np.zeros(10, np.uint32)))
        assert bench.positions() == [-1]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_with_a_grammar_is_drawn_by_the_launch_with_its_mask_only(kernels, memory, rows):
    from worker.gpu.sampler import INACTIVE

    bench = Bench(kernels, memory, 320, slots=rows)
    masked = DrawRequest(Sampling(temperature=0, grammar=GRAMMAR), 0, [], [])
    for slot in range(rows):
        bench.start(slot, masked if slot == 0 else DrawRequest(Sampling(temperature=0), 0, [], []), ends=[9])
    logits = np.zeros((rows, 320))
    logits[:, 9] = 5
    words = packed(np.isin(np.arange(320), [77, 78]), 10)
    assert bench.launch(logits, range(rows))[1] == [INACTIVE, *[9] * (rows - 1)]
    assert bench.positions() == [10, *[-1] * (rows - 1)]
    for slot in range(1, rows):
        bench.start(slot, DrawRequest(Sampling(temperature=0), 0, [], []), ends=[9])
    assert bench.launch(logits, range(rows), {0: words})[1] == [77, *[9] * (rows - 1)]
    assert bench.positions() == [11, *[-1] * (rows - 1)]


def test_a_forced_id_of_a_sequence_with_a_grammar_needs_no_mask(kernels, memory):
    bench = Bench(kernels, memory, 320)
    bench.start(0, DrawRequest(Sampling(grammar=GRAMMAR), 0, [1], [], forced=77))
    assert bench.launch(np.full((1, 320), np.nan), [0])[1] == [77]


ROWS = (2, 3, 8, 64)


def random_rows(rng, size, rows, masked):
    requests = [with_mask(rng, size, random_case(rng, size), masked) for _ in range(rows)]
    return requests, np.stack([random_logits(rng, size) for _ in range(rows)])


@pytest.mark.parametrize(("size", "launches"), [(5, 2), (320, 3), (3001, 2), (20000, 1)])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_one_launch_equal_the_twin_and_launches_of_their_own(kernels, memory, rows, size, launches):
    from worker.gpu.sampler import unpack

    rng = np.random.default_rng(size * rows)
    padding, ends = ({size - 1}, rng.integers(0, size, 3).tolist()) if size > 10 else ((), [1])
    bench = Bench(kernels, memory, size, padding, ends, slots=rows + 1, rows=rows)
    alone = Bench(kernels, memory, size, padding, ends)
    for _ in range(launches):
        requests, logits = random_rows(rng, size, rows, [*padding, *ends])
        masks = {row: each.allowed for row, each in enumerate(requests) if each.allowed is not None}
        slots = rng.permutation(rows + 1)[:rows].tolist()
        for slot, request in zip(slots, requests, strict=True):
            bench.start(slot, request)
        for row, raw in enumerate(bench.launch(logits, slots, masks)[0]):
            draw = unpack(raw, requests[row])
            same(draw, bench.twin.draw(logits[row], requests[row]))
            assert draw == alone.draw(logits[row], requests[row])
            assert int(bench.state.tokens.get()[slots[row]]) == draw.id


def hard_logits():
    """Rows whose selections need every way of `select.cuh`."""
    rng, size = np.random.default_rng(8), 20000
    near = (np.arange(size) % 7001 * 1e-13).astype(np.float32)  # almost equal, several times each
    flat = (rng.normal(size=size) * 1e-4).astype(np.float32)
    spread = np.where(np.arange(size) == 77, 300, -np.arange(size, dtype=np.float32) / 100).astype(np.float32)
    steps = np.round(rng.normal(size=size)).astype(np.float32)
    infinite = np.where(rng.integers(2, size=size) == 0, -np.inf, flat).astype(np.float32)
    return [np.zeros(size, np.float32), near, rng.permutation(near), flat, spread, steps, infinite]


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 3000}, {"top_p": 0.4}, {"top_k": 9000, "top_p": 0.7, "min_p": 0.1}, {"top_k": 40, "top_p": 0.9}, {}],
)
@pytest.mark.parametrize("masked", [False, True])
def test_selections_among_equal_almost_equal_and_distant_logits(kernels, memory, changes, masked):
    from worker.gpu.sampler import unpack

    logits = np.stack(hard_logits())
    rows, size = logits.shape
    bench, alone = (Bench(kernels, memory, size, slots=slots) for slots in (rows, 1))
    words = packed(np.random.default_rng(9).integers(0, 2, size), size // 32) if masked else None
    sampling = Sampling(logprobs=20, grammar=GRAMMAR if masked else None, **changes)
    requests = [DrawRequest(replace(sampling, seed=row), 5, [], [], allowed=words) for row in range(rows)]
    for row, request in enumerate(requests):
        bench.start(row, request)
    masks = dict.fromkeys(range(rows), words) if masked else None
    for row, raw in enumerate(bench.launch(logits, range(rows), masks)[0]):
        assert unpack(raw, requests[row]) == alone.draw(logits[row], requests[row]), row


@pytest.mark.parametrize("rows", [1, *ROWS])
def test_rows_without_an_active_slot_draw_nothing_and_write_nothing(kernels, memory, rows):
    from worker.gpu.sampler import INACTIVE

    bench = Bench(kernels, memory, 320, slots=rows + 1, rows=rows)
    logits, greedy = np.full((rows, 320), np.nan), DrawRequest(Sampling(temperature=0), 0, [], [])
    for slot in range(rows + 1):
        bench.start(slot, greedy, position=-1 if slot < rows else 10)
    before = {name: array.get() for name, array in vars(bench.state).items()}
    slots = [-1 if row % 2 else row for row in range(rows)]
    assert bench.launch(logits, slots)[1] == [INACTIVE] * rows
    for name, array in vars(bench.state).items():
        np.testing.assert_array_equal(array.get(), before[name])
    logits[-1] = np.arange(320)
    assert bench.launch(logits, [*slots[:-1], rows])[1] == [INACTIVE] * (rows - 1) + [319]
    assert bench.positions() == [-1] * rows + [11]


@pytest.mark.parametrize("rows", [1, *ROWS])
def test_a_slot_ends_with_an_end_id_or_at_its_limit(kernels, memory, rows):
    from worker.gpu.sampler import INACTIVE

    bench = Bench(kernels, memory, 320, slots=rows)
    for slot in range(rows):  # slot s draws id s, and ends with it if s is odd, at its second token if even
        ends = [*range(100, 115), slot] if slot % 2 else [300, slot + 1]
        bench.start(slot, DrawRequest(Sampling(temperature=slot % 3, top_k=1), 0, [], []), ends=ends, limit=12)
    logits = np.eye(rows, 320) * 50
    assert bench.launch(logits, range(rows))[1] == list(range(rows))
    assert bench.positions() == [-1 if slot % 2 else 11 for slot in range(rows)]
    assert bench.launch(logits, range(rows))[1] == [INACTIVE if slot % 2 else slot for slot in range(rows)]
    assert bench.positions() == [-1] * rows
    assert bench.launch(logits, range(rows))[1] == [INACTIVE] * rows


@pytest.mark.parametrize("rows", [1, *ROWS])
def test_a_row_that_is_not_finite_stops_its_slot_only(kernels, memory, rows):
    from worker.gpu.sampler import NOT_FINITE

    bench = Bench(kernels, memory, 320, slots=rows)
    for slot in range(rows):
        sampling = Sampling(temperature=slot % 2, top_k=1, logprobs=2 if slot % 4 < 2 else None)
        bench.start(slot, DrawRequest(sampling, 0, [], []))
    logits = np.eye(rows, 320) * 50
    broken = [row for row in range(rows) if row % 3 == 0]
    logits[broken, 200] = [np.nan if row % 2 else np.inf for row in broken]
    assert bench.launch(logits, range(rows))[1] == [NOT_FINITE if row in broken else row for row in range(rows)]
    assert bench.positions() == [-1 if slot in broken else 11 for slot in range(rows)]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_slots_advance_over_many_steps_as_the_twin_does(kernels, memory, rows):
    from worker.gpu.sampler import unpack

    rng, size = np.random.default_rng(rows), 320
    bench = Bench(kernels, memory, size, ends=[3], slots=rows)
    prompts = [rng.integers(0, size, 5).tolist() for _ in range(rows)]
    samplings = [
        Sampling(
            temperature=[0.0, 1.0, 0.7][row % 3],
            **{"top_p": 0.9, "seed": row, "repetition_penalty": 1.2 if row % 4 else 1.0, "frequency_penalty": 0.3},
            **{"penalize_prompt": row % 2 == 0, "logit_bias": {row: 4.0, 9: -3.0, 12: 1.0} if row % 3 else {}},
            **{"min_tokens": 5, "stop_token_ids": frozenset({12, 13})},
            logprobs=2 if row % 2 else None,
        )
        for row in range(rows)
    ]
    generated = [[] for _ in range(rows)]
    for row in range(rows):
        bench.start(row, DrawRequest(samplings[row], 0, prompts[row], []))
    for index in range(12):
        logits = np.stack([random_logits(rng, size) for _ in range(rows)]).astype(np.float32)
        requests = [DrawRequest(samplings[row], index, prompts[row], generated[row]) for row in range(rows)]
        for row, raw in enumerate(bench.launch(logits, range(rows))[0]):
            draw = unpack(raw, requests[row])
            same(draw, bench.twin.draw(logits[row], requests[row]))
            generated[row].append(draw.id)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_forced_id_is_counted_and_ends_its_slot_like_a_drawn_one(kernels, memory, rows):
    bench = Bench(kernels, memory, 320, slots=rows)
    sampling = Sampling(temperature=0, frequency_penalty=1.0)
    for slot in range(rows):
        bench.start(slot, DrawRequest(sampling, 0, [1], [], forced=77), ends=[77] if slot else [])
    assert bench.launch(np.full((rows, 320), np.nan), range(rows))[1] == [77] * rows
    assert bench.positions() == [11, *[-1] * (rows - 1)]
    assert int(bench.sampler._counts.get()[0, 77]) == 1


@pytest.mark.parametrize("count", [3, 1500, 3001])
def test_any_number_of_ids_can_be_biased(kernels, memory, count):
    rng, size = np.random.default_rng(count), 3001
    logits, ids = random_logits(rng, size), rng.permutation(size)[:count]
    sampling = Sampling(temperature=0, logit_bias={int(i): float(rng.normal() * 9) for i in ids})
    bench, request = Bench(kernels, memory, size, slots=2), DrawRequest(sampling, 0, [], [])
    plain = DrawRequest(Sampling(temperature=0), 0, [], [])
    for requests in ((request, plain), (plain, request), (plain, plain)):  # a list is replaced by the next one
        for slot in range(2):
            bench.start(slot, requests[slot])
        expected = [bench.twin.draw(logits, each).id for each in requests]
        assert bench.launch([logits, logits], range(2))[1] == expected
