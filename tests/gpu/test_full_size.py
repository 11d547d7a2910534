"""The three models and llama-3.2-1b at their exact shapes and type mixes, random weights: load, answer, numbers.

Files lie in `full-size/` of the worker's cache folder; `suite.py --synth` writes them, and where one is missing its
tests are skipped by name. A prompt's logits are held against the twin that rounds alike (1 %) and the f32 reference
(5 %), which take their weights from the device (`streamed.py`); that those are the file's is a test of its own. Speeds
are recorded, not judged, beside the bytes that a token moves and the read bandwidth of the same run.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.gpu.served import answer, device_bytes, load, settle
from tests.gpu.speed import decode_bytes, read_bandwidth
from tests.gpu.streamed import DeviceRows, References
from tests.gpu.trail import logits_and_trail
from tests.models import decode, prefill
from worker.config import ModelSection, load_settings
from worker.engine import Sequence
from worker.gguf_file import GgufFile
from worker.ops import KV_BLOCK, QTensor
from worker.quants import dequantize
from worker.runtime import plan
from worker.sampling import Sampling

MODELS = ("qwen2.5-0.5b", "llama-3.2-1b", "phi-3-mini", "gpt-oss-20b")
CONTEXT, TOKENS, PROMPT = 4096, 256, 128
TWIN, REFERENCE, NEAR_TIE = 0.01, 0.05, 1e-3
SAMPLED = 512  # rows of a matrix that are compared with f64
MIB = 1 << 20


@pytest.fixture(scope="module", params=MODELS)
def full(request, gpu):
    """One model, loaded, with what the driver said before; gone before the next one comes."""
    path = load_settings().hub.cache / "full-size" / f"{request.param}.gguf"
    if not path.exists():
        pytest.skip(f"no {path.name} in {path.parent.name}/ of the cache; suite.py --synth TOOL writes it")
    settle()
    began = time.perf_counter()
    loaded = load(path, context=CONTEXT)
    made = SimpleNamespace(name=request.param, path=path, loaded=loaded, load_s=time.perf_counter() - began)
    yield made
    del made.loaded, loaded
    settle()


@pytest.fixture(scope="module")
def bandwidth(gpu):
    return read_bandwidth()


@pytest.fixture
def rows(kernels, memory):
    with DeviceRows(kernels, memory) as made:
        yield made


def random_ids(full, count, seed=0):
    return np.random.default_rng(seed).integers(0, full.loaded.hparams.vocab_size - 8, count).tolist()


def relative(found, exact):
    return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact))


def test_resident_weights_are_the_files_within_2_percent(full, record_property):
    with GgufFile.open(full.path) as file:
        in_file = sum(info.nbytes for info in file.tensors.values())
    resident = full.loaded.backend.memory().weights
    record_property(
        f"{full.name} load", f"{full.load_s:.1f} s, {resident / 1e9:.3f} GB, {resident / in_file:.5f} of file"
    )
    assert abs(resident - in_file) <= 0.02 * in_file
    assert full.loaded.backend.strays()[1] == []


def test_what_the_plan_says_before_loading_holds_after_it(full, record_property):
    """The arithmetic of `worker inspect` and of INSUFFICIENT_VRAM: exact for weights and KV, enough for all else."""
    with GgufFile.open(full.path) as file:
        planned = plan(file, ModelSection(context=CONTEXT), full.loaded.backend)
    used = full.loaded.backend.memory()
    assert planned.weight_bytes == used.weights
    assert planned.kv_blocks * KV_BLOCK * planned.kv_bytes_per_token == used.kv
    working = used.activations + used.workspace
    record_property(
        f"{full.name} besides weights and KV",
        f"{working / MIB:,.0f} MiB, where the plan allows {planned.overhead_bytes / MIB:,.0f} MiB",
    )
    assert working <= planned.overhead_bytes


def test_accounted_memory_is_the_drivers(full, record_property):
    answer(full.loaded, random_ids(full, 40), Sampling(temperature=0), 4)
    settle()
    accounted, drivers = full.loaded.backend.memory().used, device_bytes()
    record_property(f"{full.name} memory", f"accounted {accounted / MIB:,.0f} MiB, driver {drivers / MIB:,.0f} MiB")
    assert abs(accounted - drivers) <= max(0.01 * drivers, 32 * MIB)


def test_256_tokens_decode_and_a_seed_repeats(full, bandwidth, record_property):
    prompt, sampling = random_ids(full, PROMPT), Sampling(temperature=0.8, seed=7)
    first = answer(full.loaded, prompt, sampling, TOKENS)
    seconds, again = timed_decode(full.loaded.engine, prompt, sampling)
    assert len(first) == TOKENS
    assert again == first
    moved = decode_bytes(full.path, full.loaded.hparams, PROMPT + TOKENS // 2)
    rate = 1 / seconds
    share = 100 * moved * rate / bandwidth
    record_property(
        f"{full.name} decode",
        f"{rate:,.0f} tok/s, {moved / 1e6:,.0f} MB a token, {share:.0f} % of {bandwidth / 1e9:,.0f} GB/s",
    )


def timed_decode(engine, prompt, sampling):
    """Seconds a token after the first, and all ids."""
    engine.add(Sequence("timed", prompt, TOKENS, sampling))
    tokens = []
    while not tokens:
        tokens += engine.step()
    began = time.perf_counter()
    while not engine.idle:
        tokens += engine.step()
    return (time.perf_counter() - began) / (TOKENS - 1), [token.draw.id for token in tokens]


@pytest.mark.parametrize("tokens", [128, 512, 2048])
def test_a_prompts_first_token_comes_and_repeats(full, tokens, record_property):
    prompt, greedy = random_ids(full, tokens), Sampling(temperature=0)
    seconds, drawn = [], set()
    for _ in range(4):
        began = time.perf_counter()
        drawn |= set(answer(full.loaded, prompt, greedy, 1))
        seconds.append(time.perf_counter() - began)
    record_property(
        f"{full.name} prefill {tokens}", f"{tokens / min(seconds):,.0f} tok/s, first token {1e3 * min(seconds):.1f} ms"
    )
    assert len(drawn) == 1


def test_the_device_holds_the_files_values(full, rows):
    """A matrix's first and last row and those in which a piece of its way to the device ends: bit for bit."""
    from worker.gpu.upload import CHUNK

    compared = 0
    with GgufFile.open(full.path) as file:
        for tensor in held(full.loaded.engine._runner._model):
            name, _, part = tensor.name.partition("[")
            info = file.tensors[name]
            if not hasattr(tensor.data, "planes"):
                assert rows.vector(tensor).tobytes() == dequantize(file.data(info), info.kind).tobytes(), name
                continue
            blocks = file.data(info).reshape(-1, info.kind.row_bytes(info.shape[-1]))
            first = int(part.partition(":")[0] or 0)
            flat = flattened(tensor)
            ends = range(CHUNK // blocks.shape[1], flat.shape[0], max(1, CHUNK // blocks.shape[1]))
            for row in {0, flat.shape[0] - 1, *ends, *(end - 1 for end in ends)}:
                expected = dequantize(blocks[first + row][None], info.kind)
                assert rows.fetch(flat.rows(row, row + 1)).tobytes() == expected.tobytes(), (tensor.name, row)
                compared += 1
    assert compared >= 2 * full.loaded.hparams.block_count


def held(value):
    """Every tensor of a model, wherever its adapter keeps it."""
    if isinstance(value, QTensor):
        yield value
        return
    parts = value if isinstance(value, list | tuple) else [getattr(value, name) for name in names_in(value)]
    for part in parts:
        yield from held(part)


def names_in(value):
    return getattr(value, "__dataclass_fields__", None) or getattr(value, "__dict__", ())


def flattened(matrix):
    """A matrix of experts [E, rows, cols] as one of [E·rows, cols]; others as they are."""
    planes = tuple(None if plane is None else plane.reshape(-1, plane.shape[-1]) for plane in matrix.data.planes)
    shape = math.prod(matrix.shape[:-1]), matrix.shape[-1]
    return replace(matrix, shape=shape, data=replace(matrix.data, planes=planes))


def test_logits_of_100_tokens_and_3_steps_are_the_twins_and_the_references(full, rows, record_property):
    """A prompt's are within 1 % of the twin and 5 % of f32. A step's are chaotic in 8 bits: a last place that crosses a
    rounding's edge is percents some layers on. So a step is the twin's half a layer at a time, from the GPU's own
    inputs, and as a whole it is no further from f32 than the twin is.
    """
    began, table, steps = time.perf_counter(), np.arange(8, dtype=np.int32), {}
    batches = {"prefill": prefill(random_ids(full, 100), table=table, rows=[99])}
    batches |= {f"step {i}": decode(t, 100 + i, table) for i, t in enumerate(random_ids(full, 3, seed=1))}
    runner = full.loaded.engine._runner
    references = References(runner._model, full.loaded.hparams, rows)
    for name, batch in batches.items():
        references.set_cache(*first_blocks(runner.cache.array))
        logits, trail = logits_and_trail(runner, batch)
        assert np.array_equal(logits, runner.logits(batch)), "a graph launches what its capture did"
        steps[name] = Distances.of(logits, references.answers(batch, trail))
    said = "; ".join(f"{name} {each}" for name, each in steps.items())
    record_property(f"{full.name} logits", f"{said}; {time.perf_counter() - began:.0f} s")
    assert steps["prefill"].from_twin < TWIN
    for each in steps.values():
        assert each.from_f32 < max(REFERENCE, 1.5 * each.twins_from_f32)
        assert max(each.worst_half, each.head) < TWIN
        assert each.tie < NEAR_TIE


@dataclass
class Distances:
    """How far logits are from the references', and the worst that the led run found."""

    from_twin: float
    from_f32: float
    twins_from_f32: float
    worst_half: float
    head: float
    tie: float

    @classmethod
    def of(cls, logits, answers):
        exact, twin = answers.exact, answers.twin
        whole = relative(logits, twin), relative(logits, exact), relative(twin, exact)
        return cls(*whole, max(answers.halves), relative(logits, answers.led), answers.tie)

    def __str__(self):
        shares = self.from_twin, self.from_f32, self.twins_from_f32, self.worst_half, self.head
        twin, f32, twins, half, head = (f"{100 * share:.2f} %" for share in shares)
        tie = f", experts within {self.tie:.1e}" if self.tie else ""
        return (
            f"{twin} from the twin, {f32} from f32 (the twin {twins}); worst half of a layer {half}, head {head}{tie}"
        )


def first_blocks(cache):
    """K and V of the first 8 blocks, as the CPU's cache holds them: [layers, 8, B, Hk, D] each."""
    return np.moveaxis(cache[:, :, :8].get().swapaxes(3, 4), 1, 0)


def test_products_of_each_type_and_shape_are_within_1_percent_of_f64(full, kernels, memory, record_property):
    from tests.gpu.activations import activations, halved, rows_of
    from tests.gpu.guarded import GuardedPool
    from worker.gpu import matmul, matvec

    found = {}
    with GgufFile.open(full.path) as file:
        kinds = {(info.kind, info.shape): info for info in file.tensors.values() if len(info.shape) > 1}
        for (kind, shape), info in kinds.items():
            if info.name.endswith(".bias"):
                continue
            linear, weights = sampled_rows(file, info, kernels, memory)
            pool, x = GuardedPool(), rows_of(20, shape[-1])
            exact = x.astype(np.float64) @ weights.astype(np.float64).T
            (decoded,) = matvec.matvec(kernels, pool, activations(pool, x), [linear])
            prefilled = matmul.matmul(kernels, pool, halved(pool, x), linear)
            errors = relative(decoded.get(), exact), relative(prefilled.get(), exact)
            pool.check()
            found[kind.name] = max(found.get(kind.name, (0.0, 0.0)), errors)
            assert max(errors) < 0.01, (info.name, errors)
    record_property(
        f"{full.name} products", "; ".join(f"{k} {100 * d:.2f} %, {100 * p:.3f} %" for k, (d, p) in found.items())
    )


def sampled_rows(file, info, kernels, memory):
    """The last SAMPLED rows of a matrix, of its last expert if it has any: on the device, and as f32."""
    from tests.gpu.weights import upload
    from worker.ops import Linear
    from worker.quants import dequantize

    blocks = file.data(info).reshape(math.prod(info.shape[:-1]), -1)[-min(SAMPLED, info.shape[-2]) :]
    shape = len(blocks), info.shape[-1]
    blocks = np.ascontiguousarray(blocks)
    return Linear(upload(kernels, memory, info.kind, shape, blocks)), dequantize(blocks, info.kind).reshape(shape)
