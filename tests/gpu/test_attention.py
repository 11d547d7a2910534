"""Attention on the GPU compared with its twin with an f16 cache, in both phases.

Bounds: the prefill kernel rounds q, the softmax's weights and y to f16 (2^-11 each), so 1e-3 of the
norm; decode computes in f32 throughout, so 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.gpu.activations import q8_activations, q8_tiles, values_of
from tests.gpu.guarded import GuardedPool
from worker.cpu.attention import attend
from worker.cpu.kv_cache import KvCache as TwinCache
from worker.cpu.plain import rotate
from worker.gpu.attention import group_size
from worker.gpu.decode_attention import decode_splits
from worker.gpu.prefill_state import whole_tiles
from worker.ops import KV_BLOCK, Attention, Batch, Phase, PositionScale, QTensor
from worker.quants import F32
from worker.rope import Rope

PREFILL_BOUND, DECODE_BOUND = 1e-3, 1e-5
BLOCKS = 80


@dataclass(frozen=True)
class Shape:
    dim: int
    heads: int
    kv_heads: int
    adjacent: bool = False
    window: int = 0
    sinks: bool = False
    rotary_dims: int = 0

    @property
    def rotary(self):
        return self.rotary_dims or self.dim


SHAPES = [
    Shape(64, 14, 2),
    Shape(64, 16, 2, window=128, sinks=True),
    Shape(64, 9, 3, adjacent=True),
    Shape(64, 64, 8, sinks=True),
    Shape(64, 4, 4, window=5, sinks=True, rotary_dims=32),
    Shape(64, 32, 2, window=33),
    Shape(96, 4, 4),
    Shape(96, 6, 2, window=40, adjacent=True, rotary_dims=64),
    Shape(128, 8, 2, adjacent=True),
    Shape(128, 16, 2, window=100, sinks=True),
    Shape(64, 5, 1),
    Shape(256, 4, 2, window=40),
    Shape(256, 8, 1, rotary_dims=128),
    Shape(512, 8, 1),
    Shape(512, 6, 2, window=140, sinks=True, rotary_dims=256),
]


# Few heads, since these run after prefixes of several segments (256 positions).
LONG_SHAPES = [
    Shape(64, 4, 2),
    Shape(64, 2, 1, window=128, sinks=True),
    Shape(64, 2, 2, window=700, adjacent=True),
    Shape(96, 3, 1, sinks=True),
    Shape(128, 2, 1),
    Shape(256, 2, 1, window=700),
    Shape(512, 2, 1, window=700),
]


@dataclass
class Scene:
    """Random q, k, v of one sequence of `tokens`, and the twin's result."""

    shape: Shape
    tokens: int
    seed: int = 0
    kv_type: str = "f16"
    expected: np.ndarray = field(init=False)

    def __post_init__(self):
        s, rng = self.shape, np.random.default_rng(self.seed)
        self.q = rng.normal(size=(self.tokens, s.heads * s.dim)).astype(np.float32) * 2
        self.k = rng.normal(size=(self.tokens, s.kv_heads * s.dim)).astype(np.float32) * 2
        self.v = rng.normal(size=self.k.shape).astype(np.float32)
        self.rope = Rope(0.7 ** np.arange(s.rotary // 2), BLOCKS * KV_BLOCK, 1.1, s.adjacent)
        self.sink_values = rng.normal(size=s.heads).astype(np.float32) * 3 if s.sinks else None
        self.table = rng.permutation(BLOCKS)[: -(-self.tokens // KV_BLOCK)].astype(np.int32)
        self.expected = self._twin()

    def spec(self, wrap):
        s = self.shape
        sinks = QTensor("sinks", (s.heads,), F32, wrap(self.sink_values)) if s.sinks else None
        return Attention(0, s.heads, s.kv_heads, s.dim, self.rope, s.window, sinks)

    def _twin(self):
        positions = np.arange(self.tokens, dtype=np.int32)
        batch = Batch(Phase.PREFILL, positions, positions, (self.table,), positions[:0])
        cache = TwinCache([self.spec(lambda sinks: sinks)], BLOCKS, self.kv_type)
        keys = rotate(self.k.reshape(self.tokens, -1, self.shape.dim), positions, self.rope)
        cache.write(0, batch, keys, self.v.reshape(keys.shape))
        queries = rotate(self.q.reshape(self.tokens, -1, self.shape.dim), positions, self.rope)
        self.cache = cache
        return attend(queries, cache, self.spec(lambda sinks: sinks), batch)


@dataclass
class Bench:
    """A poisoned KV cache, its launchers, and a pool that detects stray writes."""

    scene: Scene
    kernels: object
    memory: object
    processors: int = 132
    slots: int = 3

    def __post_init__(self):
        from worker.gpu.attention import AttentionMemory
        from worker.gpu.decode_attention import DecodeAttention
        from worker.gpu.prefill_attention import PrefillAttention
        from worker.gpu.state import KvCache

        self.pool = GuardedPool()
        self.cache = KvCache(self.memory, [self.scene.spec(self.pool.put)], BLOCKS, self.scene.kv_type)
        self.cache.array.view(np.uint8).fill(0xFF)
        shared = AttentionMemory(self.memory, self.cache)
        self.prefill_attention = PrefillAttention(shared, self.processors)
        self.decode_attention = DecodeAttention(shared, self.slots, self.processors)
        self.spec = self.scene.spec(self.pool.put)

    def _inputs(self, tokens):
        q, k, v = (self.pool.put(x[tokens]) for x in (self.scene.q, self.scene.k, self.scene.v))
        return (q, None, None) if self.spec.reads_only else (q, k, v)

    def prefill(self, start, stop):
        q, k, v = self._inputs(slice(start, stop))
        batch = prefill_state(self.memory, [chunk_of(self.scene, start, stop)], stop - start)
        y = self.prefill_attention.launch(self.kernels, self.pool, q, k, v, self.spec, batch)
        return values_of(y, q.shape[1])

    def decode(self, positions, row_slots=None):
        """y of a step; `positions` are those of the slots, which all have the scene's table."""
        at = np.asarray(positions, np.int32)
        slots = np.arange(len(at), dtype=np.int32) if row_slots is None else np.asarray(row_slots, np.int32)
        tokens = np.clip(np.where(slots < 0, 0, at[slots]), 0, self.scene.tokens - 1)
        q, k, v = self._inputs(tokens)
        tables = np.tile(self.scene.table, (len(at), 1))
        state = DeviceState(self.pool.put(slots), self.pool.put(at), self.pool.put(tables))
        self.rows = self.decode_attention.launch(self.kernels, self.pool, q, k, v, self.spec, state)
        return self.rows.x.get()

    def after(self, start, stop):
        """y of a chunk after the twin's cached prefix."""
        self.fill(start)
        return self.prefill(start, stop)

    def fill(self, tokens):
        """Copy the twin's keys and values of the first `tokens` positions."""
        raw = self.cache.array.get()
        at = np.arange(tokens)
        blocks, offsets = self.scene.table[at // KV_BLOCK], at % KV_BLOCK
        for which, twin in enumerate((self.scene.cache.k, self.scene.cache.v)):
            stored = twin[0][blocks, offsets]
            if self.scene.kv_type == "f16":
                raw[0, which, blocks, :, offsets] = stored
            else:
                codes, scales = q8_parts(raw[0, which], self.scene.shape.dim)
                codes[blocks, :, offsets] = stored["codes"]
                scales[blocks, :, SCALE_INDEX[offsets]] = stored["scale"]
        self.cache.array.set(raw)


SCALE_INDEX = np.array([0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15])
"""Where the scale of each row of a KV block lies among its scales (kernels/kv_cache.cuh)."""


def q8_parts(cache, dim):
    """Views of codes [blocks, Hk, B, D] u8 and scales [blocks, Hk, B] f16, as they lie, of one half of a q8 cache."""
    shape, size = cache.shape[:2], KV_BLOCK * dim
    codes = np.lib.stride_tricks.as_strided(cache, (*shape, KV_BLOCK, dim), (*cache.strides[:2], dim, 1))
    words = cache.view(np.float16)
    strides = (*words.strides[:2], 2)
    scales = np.lib.stride_tricks.as_strided(words[:, :, size // 2 :], (*shape, KV_BLOCK), strides)
    return codes, scales


def chunk_of(scene, start, stop):
    """Positions [start, stop) of a scene."""
    positions = np.arange(start, stop, dtype=np.int32)
    return Batch(Phase.PREFILL, positions, positions, (scene.table,), positions[:0])


def prefill_state(memory, chunks, rows, most=1):
    """The state of a prefill batch of `rows` rows and at most `most` chunks."""
    import cupy

    from worker.gpu.prefill_state import PrefillState

    state = PrefillState(memory, rows, 1, BLOCKS, most)
    state.load(chunks, cupy.cuda.get_current_stream())
    return state


@dataclass
class DeviceState:
    row_slots: object
    positions: object
    tables: object


def distance(got, expected):
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("tokens", [1, 16, 77, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_equals_its_twin_and_writes_nothing_else(kernels, memory, shape, tokens):
    scene = Scene(shape, tokens)
    bench = Bench(scene, kernels, memory)
    assert distance(bench.prefill(0, tokens), scene.expected) < PREFILL_BOUND
    bench.pool.check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("products")
def test_prefill_in_chunks_gives_the_bits_of_the_whole_prompt(kernels, memory, shape):
    scene = Scene(shape, 300)
    whole = Bench(scene, kernels, memory)
    y, written = whole.prefill(0, 300), whole.cache.array.get()
    for chunk in (16, 64, 208):
        bench = Bench(scene, kernels, memory)
        chunks = [bench.prefill(at, min(at + chunk, 300)) for at in range(0, 300, chunk)]
        assert np.array_equal(np.concatenate(chunks).view(np.uint32), y.view(np.uint32))
        assert np.array_equal(bench.cache.array.get().view(np.uint16), written.view(np.uint16))


# Tokens beyond those of split chunks: whole and ragged wide tiles (192 rows), windows that later
# rows of one begin later, contexts of several segments, ends inside of a KV block.
WGMMA_CHUNKS = [(0, 129), (0, 400), (250, 450), (601, 1100)]
WGMMA_SHAPES = [
    Shape(64, 7, 1),
    Shape(64, 4, 2, window=128, sinks=True),
    Shape(64, 2, 2, window=700, adjacent=True),
    Shape(96, 2, 2, sinks=True),
    Shape(96, 2, 1, window=40),
    Shape(128, 4, 1),
    Shape(128, 2, 2, window=100, sinks=True),
]


@pytest.mark.parametrize(("start", "stop"), WGMMA_CHUNKS)
@pytest.mark.parametrize("shape", WGMMA_SHAPES, ids=str)
@pytest.mark.usefixtures("wgmma")
def test_wgmma_gives_the_bits_of_mma_sync_and_reads_no_unwritten_slot(kernels, memory, monkeypatch, shape, start, stop):
    scene, results = Scene(shape, stop), []
    for wgmma in (True, False):
        monkeypatch.setattr(kernels, "wgmma", wgmma)
        bench = Bench(scene, kernels, memory)  # whose unwritten slots are NaNs
        results.append(bench.after(start, stop))
        bench.pool.check()
    assert results[0].tobytes() == results[1].tobytes()
    assert distance(results[0], scene.expected[start:stop]) < PREFILL_BOUND


def test_stages_and_older_segments_fit_the_shared_memory_of_a_block():
    from worker.gpu import prefill_attention

    barriers, dims = 128, prefill_attention._WGMMA_STAGES
    assert all(prefill_attention._wgmma_bytes(dim) + barriers <= 227 << 10 for dim in dims)


READING = [
    *(Shape(64, 8, 2, window=60, sinks=True), Shape(64, 16, 2), Shape(96, 4, 2, adjacent=True), Shape(128, 4, 1)),
    *(Shape(256, 8, 1), Shape(256, 4, 2, window=60), Shape(512, 8, 1), Shape(512, 4, 2)),
]


@pytest.mark.parametrize("positions", [[300], [0], [150, 300, 31, 0]], ids=str)
@pytest.mark.parametrize("shape", READING, ids=str)
def test_a_layer_that_reads_only_has_the_bits_of_the_layer_that_has_written(kernels, memory, shape, positions):
    scene = Scene(shape, 301)
    bench = Bench(scene, kernels, memory, slots=len(positions))
    bench.fill(301)
    expected, cache = bench.decode(positions), bench.cache.array.get()
    bench.spec = replace(bench.spec, reads_only=True)
    assert bench.decode(positions).tobytes() == expected.tobytes()
    assert bench.cache.array.get().tobytes() == cache.tobytes()
    bench.pool.check()


@pytest.mark.parametrize("shape", READING, ids=str)
def test_a_chunk_of_a_layer_that_reads_only_has_the_bits_of_the_layer_that_has_written(kernels, memory, shape):
    bench = Bench(Scene(shape, 77), kernels, memory)
    expected, cache = bench.prefill(0, 77), bench.cache.array.get()
    bench.spec = replace(bench.spec, reads_only=True)
    assert bench.prefill(0, 77).tobytes() == expected.tobytes()
    assert bench.cache.array.get().tobytes() == cache.tobytes()
    bench.pool.check()


@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
@pytest.mark.parametrize(("start", "stop"), [(505, 535), (1000, 1100), (960, 1100)])
def test_prefill_over_several_segments_equals_its_twin(kernels, memory, shape, start, stop):
    scene = Scene(shape, 1100)
    bench = Bench(scene, kernels, memory)
    assert distance(bench.after(start, stop), scene.expected[start:stop]) < PREFILL_BOUND
    bench.pool.check()


@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
@pytest.mark.usefixtures("products")
def test_a_short_chunk_after_a_long_prefix_gives_the_bits_of_the_whole_prompt(kernels, memory, shape):
    scene = Scene(shape, 1100)
    whole = Bench(scene, kernels, memory)
    y = whole.prefill(0, 1100)
    for processors in (1, 132):
        bench = Bench(scene, kernels, memory, processors)
        bench.cache.array.set(whole.cache.array.get())
        for start, stop in ((505, 520), (1020, 1044), (1000, 1100), (1076, 1100), (1099, 1100)):
            assert np.array_equal(bench.prefill(start, stop).view(np.uint32), y[start:stop].view(np.uint32))


def test_a_chunk_whose_partial_results_exceed_the_capacity_gives_the_same_bits(kernels, memory, monkeypatch):
    scene = Scene(Shape(64, 4, 2, sinks=True), 1200)
    y = Bench(scene, kernels, memory).after(1100, 1200)
    # 100 tokens have 140 partial results.
    monkeypatch.setattr("worker.gpu.prefill_attention.MAX_PARTIAL_BYTES", 136 * 4608)
    bench = Bench(scene, kernels, memory)
    assert np.array_equal(bench.after(1100, 1200).view(np.uint32), y.view(np.uint32))
    assert np.array_equal(bench.prefill(1150, 1200).view(np.uint32), y[50:].view(np.uint32))


# Rows and chunks (start, stop) of a batch: short ones, and one after a prefix of several segments.
BATCHES = [(320, [(0, 77), (0, 1), (0, 16), (32, 100), (0, 127)]), (96, [(0, 20), (1040, 1081), (96, 110)])]


@pytest.mark.parametrize(("rows", "spans"), BATCHES, ids=["whole", "split"])
@pytest.mark.parametrize("kv_type", ["f16", "q8"])
@pytest.mark.parametrize("shape", [*SHAPES[:4:3], *LONG_SHAPES], ids=str)
@pytest.mark.usefixtures("products")
def test_chunks_of_a_batch_have_the_bits_that_each_has_alone(kernels, memory, shape, kv_type, rows, spans):
    """They are chunks of several sequences, with a twin each; rows between them become finite."""
    scenes = [Scene(shape, stop, seed, kv_type) for seed, (_, stop) in enumerate(spans)]
    together, free = Bench(scenes[0], kernels, memory), np.random.default_rng(3).permutation(BLOCKS).astype(np.int32)
    cache = together.cache.array.get()
    expected_cache = cache.copy()
    x = [np.full((rows, getattr(scenes[0], name).shape[1]), np.nan, np.float32) for name in "qkv"]
    expected, chunks, first = {}, [], 0
    for scene, (start, stop) in zip(scenes, spans, strict=True):
        alone = Bench(scene, kernels, memory)
        alone.spec = together.spec
        alone.fill(start)
        before, blocks = alone.cache.array.get(), free[: len(scene.table)]
        expected[first] = alone.prefill(start, stop)
        cache[:, :, blocks] = before[:, :, scene.table]
        expected_cache[:, :, blocks] = alone.cache.array.get()[:, :, scene.table]
        for name, inputs in zip("qkv", x, strict=True):
            inputs[first : first + stop - start] = getattr(scene, name)[start:stop]
        scene.table, free = blocks, free[len(blocks) :]
        chunks.append(chunk_of(scene, start, stop))
        end, first = first + stop - start, first + whole_tiles(stop - start)
    together.cache.array.set(cache)
    state = prefill_state(memory, chunks, rows, len(chunks))
    inputs = [together.pool.put(each) for each in x]
    y = together.prefill_attention.launch(kernels, together.pool, *inputs, together.spec, state)
    found = values_of(replace(y, x=y.x[:end]), x[0].shape[1])
    for first, each in expected.items():
        assert np.array_equal(found[first : first + len(each)].view(np.uint32), each.view(np.uint32))
    assert np.isfinite(found).all()
    assert together.cache.array.get().tobytes() == expected_cache.tobytes()
    together.pool.check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_equals_its_twin_at_every_kind_of_position(kernels, memory, shape):
    scene = Scene(shape, 700)
    for position in (0, 1, 15, 16, 63, 64, 127, 128, 300, 699):
        bench = Bench(scene, kernels, memory)
        bench.fill(position)
        assert distance(bench.decode([position])[0], scene.expected[position]) < DECODE_BOUND
        bench.pool.check()


@pytest.mark.parametrize("blocks", [2, 16, 40, 264])
def test_decode_split_over_any_number_of_blocks_equals_its_twin(kernels, memory, monkeypatch, blocks):
    monkeypatch.setattr("worker.gpu.decode_attention._DECODE_BLOCKS", blocks)
    scene = Scene(Shape(64, 16, 2, window=500, sinks=True), 700)
    bench = Bench(scene, kernels, memory)
    bench.fill(699)
    first = bench.decode([699])
    assert distance(first[0], scene.expected[699]) < DECODE_BOUND
    assert np.array_equal(bench.decode([699]).view(np.uint32), first.view(np.uint32))


def test_decode_on_a_device_of_any_size_gives_the_same_bits(kernels, memory):
    scene, decoded = Scene(Shape(64, 14, 2), 700), []
    for processors in (1, 8, 132, 148):
        bench = Bench(scene, kernels, memory, processors)
        bench.fill(699)
        decoded.append(bench.decode([699]).view(np.uint32))
    assert all(np.array_equal(bits, decoded[0]) for bits in decoded)


@pytest.mark.parametrize(("heads", "kv_heads", "splits"), [(14, 2, 64), (64, 8, 33), (32, 32, 8), (32, 4, 64)])
def test_the_number_of_splits_is_that_of_an_h100(heads, kv_heads, splits):
    spec = SimpleNamespace(n_heads=heads, n_kv_heads=kv_heads, head_dim=128)
    assert decode_splits(spec) == splits == min(64, max(1, 2 * 132 // (heads // group_size(spec))))


def test_decode_of_several_sequences_gives_each_the_bits_that_it_gets_alone(kernels, memory):
    scene = Scene(Shape(64, 14, 2), 400)
    together = Bench(scene, kernels, memory)
    together.fill(400)
    got = together.decode([399, 17, 130])
    for row, position in enumerate([399, 17, 130]):
        alone = Bench(scene, kernels, memory)
        alone.fill(400)
        assert np.array_equal(alone.decode([position])[0].view(np.uint32), got[row].view(np.uint32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inactive_rows_write_zeros_and_no_keys_or_values(kernels, memory, shape):
    bench = Bench(Scene(shape, 300), kernels, memory, slots=4)
    bench.fill(290)
    before = bench.cache.array.get().view(np.uint16)
    beyond = len(bench.scene.table) * KV_BLOCK
    assert (bench.decode([-1, 290, beyond, -7], row_slots=[0, -1, 3, 2]) == 0).all()
    assert not bench.rows.q.get().any()
    assert not bench.rows.meta.get().any()
    assert np.array_equal(bench.cache.array.get().view(np.uint16), before)
    bench.pool.check()


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_an_inactive_sequence_alone_writes_no_keys_or_values(kernels, memory, shape):
    bench = Bench(Scene(shape, 30), kernels, memory, slots=1)
    bench.fill(30)
    before = bench.cache.array.get().view(np.uint16)
    bench.decode([-1])
    assert np.array_equal(bench.cache.array.get().view(np.uint16), before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_also_writes_its_rows_in_8_bits(kernels, memory, shape):
    bench = Bench(Scene(shape, 400), kernels, memory)
    bench.fill(400)
    twin = q8_activations(GuardedPool(), bench.decode([399, 3]))
    assert np.array_equal(bench.rows.q.get(), twin.q.get())
    assert np.array_equal(bench.rows.meta.get(), twin.meta.get())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_tiles_of_rows_are_written_as_tiles(kernels, memory, shape):
    bench = Bench(Scene(shape, 400), kernels, memory, slots=16)
    bench.fill(400)
    y = bench.decode([-1, *range(20, 380, 24)])
    twin = q8_tiles(GuardedPool(), y)
    assert np.array_equal(bench.rows.q.get(), twin.q.get())
    assert np.array_equal(bench.rows.meta.get(), twin.meta.get())
    assert not y[0].any()
    assert y[1:].any()
    bench.pool.check()


def test_values_beyond_f16_are_clamped_in_the_cache(kernels, memory):
    scene = Scene(Shape(64, 2, 2), 20)
    scene.v[3] = 1e6
    bench = Bench(scene, kernels, memory)
    assert np.isfinite(bench.prefill(0, 20)).all()
    assert float(bench.cache.array.get()[0, 1, scene.table[0], 0, 3].max()) == 65504.0


@pytest.mark.parametrize("slots", [None, [2, 0, -1, 1]])
def test_queries_are_scaled_by_the_factor_of_their_position(kernels, memory, slots):
    """In a chunk whose last rows are padding, or in a step with an inactive row and an inactive slot."""
    from worker.gpu.query_scales import QueryScales

    scale, rows, width = PositionScale(0.3, 5), 4, 96
    spec = Attention(0, 1, 1, width, Rope(np.ones(width // 2), 64), query_scale=scale)
    q = np.random.default_rng(1).normal(size=(rows, width)).astype(np.float32)
    pool, launcher = GuardedPool(), QueryScales(memory)
    on_device = pool.put(q)
    if slots is None:
        at = np.array([48, 49, 50, 0])
        positions = np.arange(48, 51, dtype=np.int32)
        chunk = Batch(Phase.PREFILL, positions, positions, (np.arange(4, dtype=np.int32),), positions[:0])
        launcher.prefill(kernels, on_device, spec, prefill_state(memory, [chunk], rows))
    else:
        at = np.array([63, 4, 0, 0])
        positions = pool.put(np.array([4, -1, 63], np.int32))
        row_slots = pool.put(np.array(slots, np.int32))
        state = SimpleNamespace(slots_of_rows=lambda _: row_slots, positions=positions)
        launcher.decode(kernels, on_device, spec, state)
    factors = (1 + 0.3 * np.log1p(at // 5)).astype(np.float32)
    assert np.array_equal(on_device.get(), q * factors[:, None])
    pool.check()
