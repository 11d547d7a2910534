"""Attention over a KV cache of 8 bits, compared with its twin, in both phases and all kernels.

Bounds: decode computes with the stored elements in f32, so 1e-5 of the norm as with f16, if both
caches are equal. Prefill rounds them to f16.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.engine.random_jobs import random_jobs, run_jobs
from tests.goldens import relative_error
from tests.gpu.loaded import gpu_runner
from tests.gpu.test_attention import DECODE_BOUND, PREFILL_BOUND, SCALE_INDEX, Bench, Scene, Shape, distance, q8_parts
from tests.gpu.test_attention_rows import bits
from tests.gpu.test_runner import PROMPT
from tests.models import cpu_runner, decode, engine_of, prefill
from worker.cpu.attention import attend
from worker.cpu.plain import rotate
from worker.model import DraftSupport
from worker.ops import KV_BLOCK, Batch, Phase, QTensor, RmsNorm
from worker.quants import F32

SHAPES = [
    Shape(64, 14, 2),
    Shape(64, 16, 2, window=128, sinks=True),
    Shape(64, 3, 3, adjacent=True, window=5, rotary_dims=32),
    Shape(96, 4, 4),
    Shape(96, 6, 2, window=40, sinks=True, adjacent=True, rotary_dims=64),
    Shape(128, 8, 1, adjacent=True),
    Shape(128, 4, 2, window=100, sinks=True),
    Shape(256, 4, 2, window=40),
    Shape(256, 8, 1, rotary_dims=128),
    Shape(512, 4, 1),
    Shape(512, 6, 2, window=140, sinks=True, rotary_dims=256),
]
ONE_EACH = [SHAPES[i] for i in (1, 4, 6, 7, 10)]


def scene(shape, tokens):
    return Scene(shape, tokens, kv_type="q8")


@pytest.mark.parametrize("tokens", [1, 77, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_equals_its_twin_and_writes_nothing_else(kernels, memory, shape, tokens):
    s = scene(shape, tokens)
    bench = Bench(s, kernels, memory)
    assert distance(bench.prefill(0, tokens), s.expected) < 2 * PREFILL_BOUND
    bench.pool.check()


@pytest.mark.parametrize("shape", ONE_EACH, ids=str)
def test_keys_and_values_are_stored_as_the_twin_stores_them(kernels, memory, shape):
    s = scene(shape, 50)
    bench = Bench(s, kernels, memory)
    bench.prefill(0, 50)
    at = np.arange(50)
    blocks, offsets = s.table[at // KV_BLOCK], at % KV_BLOCK
    for which, twin in enumerate((s.cache.k, s.cache.v)):
        codes, scales = q8_parts(bench.cache.array.get()[0, which], shape.dim)
        expected = twin[0][blocks, offsets]
        codes, scales = codes[blocks, :, offsets], scales[blocks, :, SCALE_INDEX[offsets]]
        if which:
            assert np.array_equal(codes, expected["codes"])
            assert np.array_equal(scales, expected["scale"])
        else:  # rotated by fused additions: an element may lie on the other side of a code's bound
            assert np.abs(codes.astype(int) - expected["codes"]).max() <= 1
            assert np.mean(codes != expected["codes"]) < 0.01
            assert np.allclose(scales, expected["scale"], rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_in_chunks_gives_the_bits_of_the_whole_prompt(kernels, memory, shape):
    s = scene(shape, 300)
    whole = Bench(s, kernels, memory)
    y, written = whole.prefill(0, 300), whole.cache.array.get()
    for chunk in (16, 208):
        bench = Bench(s, kernels, memory)
        chunks = [bench.prefill(at, min(at + chunk, 300)) for at in range(0, 300, chunk)]
        assert np.concatenate(chunks).tobytes() == y.tobytes()
        assert bench.cache.array.get().tobytes() == written.tobytes()


def expected_row(bench, position):
    """The twin's y of one decode step with the keys and values that the device has at this position."""
    s = bench.scene
    block, offset = s.table[position // KV_BLOCK], position % KV_BLOCK
    for which, twin in enumerate((s.cache.k, s.cache.v)):
        codes, scales = q8_parts(bench.cache.array.get()[0, which], s.shape.dim)
        twin[0][block, offset]["codes"] = codes[block, :, offset]
        twin[0][block, offset]["scale"] = scales[block, :, SCALE_INDEX[offset]]
    at = np.array([position], np.int32)
    queries = rotate(s.q[at].reshape(1, -1, s.shape.dim), at, s.rope)
    return attend(queries, s.cache, s.spec(lambda sinks: sinks), Batch(Phase.DECODE, at, at, (s.table,), at))[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_equals_its_twin_at_every_kind_of_position(kernels, memory, shape):
    s = scene(shape, 700)
    for position in (0, 15, 16, 127, 128, 300, 699):
        bench = Bench(s, kernels, memory)
        bench.fill(position)
        got = bench.decode([position])[0]
        assert distance(got, expected_row(bench, position)) < DECODE_BOUND
        bench.pool.check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_decode_step_stores_the_bits_of_prefill(kernels, memory, shape):
    s = scene(shape, 40)
    whole = Bench(s, kernels, memory)
    whole.prefill(0, 40)
    bench = Bench(s, kernels, memory, slots=4)
    bench.prefill(0, 36)
    for position in (36, 37):
        bench.decode([position])
    bench.decode([38, 39], row_slots=[0, -1, 1, -1])
    assert bench.cache.array.get().tobytes() == whole.cache.array.get().tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_any_lengths_have_the_bits_of_single_rows(kernels, memory, shape):
    positions = [0, 15, 128, 255, 699]
    alone = Bench(scene(shape, 700), kernels, memory, slots=1)
    alone.fill(700)
    for position in positions:  # rows of one sequence read what the others write
        alone.decode([position])
    single = {}
    for position in positions:
        alone.decode([position])
        single[position] = bits(alone, 0)
    for processors in (1, 132):
        bench = Bench(alone.scene, kernels, memory, processors, slots=7)
        bench.cache.array.set(alone.cache.array.get())
        row_slots = [3, -1, 0, 5, 4, 1, 2]
        bench.decode([*positions, -1], row_slots)
        for row, slot in enumerate(row_slots):
            inactive = slot < 0 or slot >= len(positions)
            assert not any(map(any, bits(bench, row))) if inactive else bits(bench, row) == single[positions[slot]]
        bench.pool.check()
        assert bench.cache.array.get().tobytes() == alone.cache.array.get().tobytes()


@pytest.mark.parametrize("positions", [[300], [150, 300, 31, 0]], ids=str)
@pytest.mark.parametrize("shape", ONE_EACH, ids=str)
def test_a_layer_that_reads_only_has_the_bits_of_the_layer_that_has_written(kernels, memory, shape, positions):
    bench = Bench(scene(shape, 301), kernels, memory, slots=len(positions))
    bench.fill(301)
    bench.decode(positions)
    expected, cache = bench.decode(positions), bench.cache.array.get()
    chunk = bench.prefill(0, 77)
    bench.cache.array.set(cache)
    bench.spec = replace(bench.spec, reads_only=True)
    assert bench.decode(positions).tobytes() == expected.tobytes()
    assert bench.cache.array.get().tobytes() == cache.tobytes()
    assert distance(bench.prefill(0, 77), chunk) < PREFILL_BOUND
    bench.pool.check()


@pytest.mark.parametrize("shape", ONE_EACH, ids=str)
def test_inactive_rows_write_zeros_and_no_keys_or_values(kernels, memory, shape):
    bench = Bench(scene(shape, 300), kernels, memory, slots=4)
    bench.fill(290)
    before = bench.cache.array.get()
    beyond = len(bench.scene.table) * KV_BLOCK
    assert (bench.decode([-1, 290, beyond, -7], row_slots=[0, -1, 3, 2]) == 0).all()
    bench.decode([-1], row_slots=[0])
    assert np.array_equal(bench.cache.array.get(), before)
    bench.pool.check()


@pytest.mark.parametrize("dim", [64, 96, 128, 256, 512])
def test_any_value_is_stored_finite_and_a_nan_is_kept(kernels, memory, dim):
    s = scene(Shape(dim, 2, 2), 20)
    s.v[3], s.v[4], s.v[5, :2], s.v[6] = 1e6, -np.inf, 3e-6, 0
    bench = Bench(s, kernels, memory)
    assert np.isfinite(bench.prefill(0, 20)).all()
    s.v[7, 0] = np.nan
    y = bench.prefill(0, 20)
    _, scales = q8_parts(bench.cache.array.get()[0, 1], dim)
    scales = scales[s.table[0], 0, SCALE_INDEX[:10]]
    assert scales[3] == scales[4] == 32768
    assert scales[5] > scales[6] == 0
    assert np.isnan(scales).nonzero()[0].tolist() == [7]
    assert np.isnan(y[7, :dim]).all()


def test_norms_of_heads_precede_the_codes(kernels, memory):
    for dim, heads in ((128, 4), (256, 2), (512, 4)):
        plain = Bench(scene(Shape(dim, heads, 1), 40), kernels, memory, slots=1)
        weight = plain.pool.put(np.full(dim, 3, np.float32))
        norm = RmsNorm(QTensor("norm", (dim,), F32, weight), 1e-6)
        plain.spec = replace(plain.spec, q_norm=norm, k_norm=norm)
        y = plain.prefill(0, 40)
        written = plain.cache.array.get()
        plain.prefill(0, 39)
        for _ in range(2):
            decoded = plain.decode([39])
            assert distance(decoded[0], y[39]) < 2 * PREFILL_BOUND
            assert plain.cache.array.get().tobytes() == written.tobytes()


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt-oss", "qwen3", "gemma3", "gemma4-shared"])
def test_logits_of_both_phases_equal_the_cpu_s_within_rounding(name, tiny, kernels, memory):
    """The median is bounded: a code may be another one, and near a tie, so may an expert."""
    runner = gpu_runner(tiny(name), kernels, memory, kv_type="q8")
    twin, table = cpu_runner(tiny(name), kv_type="q8"), np.arange(32, dtype=np.int32)
    batch = prefill(PROMPT[:40], table=table, rows=list(range(40)))
    pairs = zip(*(each.logits(batch)[:, None] for each in (runner, twin)), strict=True)
    assert np.median([relative_error(*pair) for pair in pairs]) < 1.5e-2
    steps = [[each.logits(decode(PROMPT[at], at, table)) for each in (runner, twin)] for at in range(40, 48)]
    assert np.median([relative_error(*pair) for pair in steps]) < 5e-2


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt-oss", "gemma3", "gemma4-shared"])
def test_other_jobs_chunks_cached_prefixes_and_draft_tokens_change_no_draw(name, tiny, kernels, memory):
    def draws(running, chunk, speculation):
        runner = gpu_runner(
            *(tiny(name), kernels, memory),
            kv_type="q8",
            kv_blocks=60,
            slots=running,
            drafts=speculation != "off",
        )
        if speculation != "off":
            runner.drafts = DraftSupport(1, dict.fromkeys((1, 2, 4, 8), 1.0), 0.0)
        engine = engine_of(runner, chunk=chunk, running=running, speculation=speculation)
        return run_jobs(engine, jobs).draws

    jobs = [replace(job, prompt=job.prompt[:9] * 4) for job in random_jobs(3, 7, 280, tokens=10, grammars=False)]
    expected = draws(1, 64, "off")
    assert draws(3, 16, "off") == expected
    assert draws(3, 64, "ngram") == expected
