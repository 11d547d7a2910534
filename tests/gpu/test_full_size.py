"""Models at full size with random weights: load and answer.

For the files see `full.py`. Speeds are recorded without a limit, beside the bytes that a token
moves and the read bandwidth of the same run. `test_full_logits.py` compares whole-model logits.
"""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from tests.gpu.full import CONTEXT, random_ids, relative
from tests.gpu.served import KERNEL_CACHE, ONE_CONTEXT, answer, device_bytes, settle
from worker.bench.traffic import Traffic
from worker.config import ModelSection
from worker.engine import Sequence
from worker.gguf_file import GgufFile
from worker.ops import KV_BLOCK
from worker.runtime import plan
from worker.sampling import Sampling

TOKENS, PROMPT = 256, 128
COMPILE_S, LOAD_S = 20, 0.5
SAMPLED = 512  # rows of a matrix compared with f64
MIB = 1 << 20


@pytest.fixture(scope="module")
def bandwidth(gpu):
    from worker.gpu.bandwidth import read_seconds

    nbytes, seconds = read_seconds(KERNEL_CACHE, 2 << 30, 7)
    return nbytes / min(seconds)


def test_resident_weights_equal_the_files_within_2_percent(full, record_property):
    with GgufFile.open(full.path) as file:
        in_file = sum(info.nbytes for info in file.tensors.values())
    resident = full.loaded.device.memory().weights
    record_property(
        f"{full.name} load", f"{full.load_s:.1f} s, {resident / 1e9:.3f} GB, {resident / in_file:.5f} of file"
    )
    assert abs(resident - in_file) <= 0.02 * in_file
    assert full.loaded.device.non_resident()[1] == []


def test_the_plan_before_loading_equals_the_memory_after_it(full, record_property):
    """The plan is exact for weights and KV, and an upper bound otherwise."""
    with GgufFile.open(full.path) as file:
        planned = plan(file, ModelSection(context=CONTEXT), full.loaded.device, ONE_CONTEXT)
    used = full.loaded.device.memory()
    assert planned.weight_bytes == used.weights
    assert planned.kv_blocks * KV_BLOCK * planned.kv_bytes_per_token == used.kv
    working = used.activations + used.workspace
    record_property(
        f"{full.name} besides weights and KV",
        f"{working / MIB:,.0f} MiB, where the plan allows {planned.overhead_bytes / MIB:,.0f} MiB",
    )
    assert working <= planned.overhead_bytes


def test_a_first_start_compiles_in_20_s_and_a_later_one_loads_in_half_a_second(full, tmp_path, record_property):
    from worker.gpu.compiler import Kernels

    names, seconds = list(full.loaded.engine._runner._kernels._loaded), []
    for _ in range(2):
        began = time.perf_counter()
        Kernels(tmp_path).prepare(names)
        seconds.append(time.perf_counter() - began)
    compiled, loaded = seconds
    record_property(f"{full.name} kernels", f"{len(names)}, compiled in {compiled:.1f} s, loaded in {loaded:.2f} s")
    assert compiled < COMPILE_S
    assert loaded < LOAD_S


def test_accounted_memory_equals_the_drivers(full, record_property):
    answer(full.loaded, random_ids(full, 40), Sampling(temperature=0), 4)
    settle()
    accounted, drivers = full.loaded.device.memory().used, device_bytes()
    record_property(f"{full.name} memory", f"accounted {accounted / MIB:,.0f} MiB, driver {drivers / MIB:,.0f} MiB")
    assert abs(accounted - drivers) <= max(0.01 * drivers, 32 * MIB)


def test_256_tokens_decode_and_a_seed_repeats(full, bandwidth, record_property):
    prompt, sampling = random_ids(full, PROMPT), Sampling(temperature=0.8, seed=7)
    first = answer(full.loaded, prompt, sampling, TOKENS)
    seconds, again = timed_decode(full.loaded.engine, prompt, sampling)
    assert len(first) == TOKENS
    assert again == first
    with GgufFile.open(full.path) as file:
        planned = plan(file, ModelSection(context=CONTEXT), full.loaded.device, ONE_CONTEXT)
    moved = Traffic(planned, full.loaded.device.weight_bytes).token_bytes(PROMPT + TOKENS // 2)
    rate = 1 / seconds
    share = 100 * moved * rate / bandwidth
    record_property(
        f"{full.name} decode",
        f"{rate:,.0f} tok/s, {moved / 1e6:,.0f} MB a token, {share:.0f} % of {bandwidth / 1e9:,.0f} GB/s",
    )


def timed_decode(engine, prompt, sampling):
    """Seconds per token after the first, and all ids."""
    engine.add(Sequence("timed", prompt, TOKENS, sampling))
    tokens = []
    while not tokens:
        tokens += engine.step()
    began = time.perf_counter()
    while not engine.idle:
        tokens += engine.step()
    return (time.perf_counter() - began) / (TOKENS - 1), [token.draw.id for token in tokens]


@pytest.mark.parametrize("tokens", [128, 512, 2048])
def test_a_prompts_first_token_is_drawn_and_repeats(full, tokens, record_property):
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


def test_products_of_each_type_and_shape_are_within_1_percent_of_f64(full, kernels, memory, record_property):
    from tests.gpu.activations import q8_activations, rows_of, scaled_f16
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
            (decoded,) = matvec.matvec(kernels, pool, q8_activations(pool, x), None, [linear])
            prefilled = matmul.matmul(kernels, pool, scaled_f16(pool, x), linear)
            errors = relative(decoded.get(), exact), relative(prefilled.get(), exact)
            pool.check()
            found[kind.name] = max(found.get(kind.name, (0.0, 0.0)), errors)
            assert max(errors) < 0.01, (info.name, errors)
    record_property(
        f"{full.name} products", "; ".join(f"{k} {100 * d:.2f} %, {100 * p:.3f} %" for k, (d, p) in found.items())
    )


def sampled_rows(file, info, kernels, memory):
    """The last SAMPLED rows of a matrix (of its last expert, if any), on the device and as f32."""
    from tests.gpu.weights import upload
    from worker.ops import Linear
    from worker.quants import dequantize

    blocks = file.data(info).reshape(math.prod(info.shape[:-1]), -1)[-min(SAMPLED, info.shape[-2]) :]
    shape = len(blocks), info.shape[-1]
    blocks = np.ascontiguousarray(blocks)
    return Linear(upload(kernels, memory, info.kind, shape, blocks)), dequantize(blocks, info.kind).reshape(shape)
