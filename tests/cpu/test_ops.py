"""The NumPy ops, which define all others, against their formulas in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import gguf
import numpy as np
import pytest

from tests.models import cpu_runner, prefill
from worker.cpu.kv_cache import KvCache
from worker.cpu.ops import CpuOps
from worker.cpu.plain import gated, matmul, rms_norm, softmax, top_k
from worker.cpu.threads import Threads
from worker.ops import GELU_GLU, KV_BLOCK, Activation, Attention, Batch, Linear, Phase, QTensor, RmsNorm, Routes
from worker.quants import F32
from worker.rope import Rope, frequencies

RNG = np.random.default_rng(7)


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def tensor(values):
    return QTensor("t", values.shape, F32, values)


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 40])
def test_matmul_equals_float64_and_writes_every_row(tile, rows):
    x, weight, bias = random(rows, 33), random(7, 33), random(7)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    np.testing.assert_allclose(matmul(x, weight, bias, tile, Threads(1)), expected, atol=1e-5)


def test_a_row_of_matmul_depends_neither_on_other_rows_nor_on_the_threads():
    x, weight = random(64, 576), random(1537, 576)
    expected = matmul(x, weight, None, KV_BLOCK, Threads(1))
    for count, threads in ((1, 2), (16, 3), (17, 4), (33, 1), (64, 2)):
        np.testing.assert_array_equal(matmul(x[:count], weight, None, KV_BLOCK, Threads(threads)), expected[:count])
    alone = matmul(x[2:3], weight, None, 1, Threads(1))[0]
    np.testing.assert_array_equal(matmul(x[:3], weight, None, 1, Threads(2))[2], alone)


def test_an_error_on_another_thread_is_raised_on_the_calling_thread():
    def work(start, stop):
        if start:
            raise ValueError("on a thread")

    with pytest.raises(ValueError, match="on a thread"):
        Threads(2).over_rows(1024, 1024, work)


def test_rms_norm_by_hand():
    x, weight = random(3, 8), random(8)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), expected, rtol=1e-5)


def test_a_sink_adds_to_the_denominator_of_the_softmax_alone():
    scores, sink = random(2, 5), np.array([[0.5], [-1.0]], np.float32)
    wide = np.exp(scores.astype(np.float64))
    np.testing.assert_allclose(softmax(scores, sink), wide / (wide.sum(-1, keepdims=True) + np.exp(sink)), rtol=1e-5)
    assert (softmax(scores, sink).sum(-1) < 1).all()


def test_swiglu_and_its_clamped_form_by_hand():
    gate, up = np.array([9.0, -9.0, 1.0, -90.0], np.float32), np.array([-9.0, 9.0, 0.5, 1.0], np.float32)
    silu = gate / (1 + np.exp(-gate.astype(np.float64)))
    np.testing.assert_allclose(gated(gate, up, Activation()), silu * up, rtol=1e-5, atol=1e-30)
    g, u = np.array([7.0, -9.0, 1.0, -90.0]), np.array([-7.0, 7.0, 0.5, 1.0])  # the gate has no lower limit
    clamped = g / (1 + np.exp(-1.702 * g)) * (u + 1)
    np.testing.assert_allclose(gated(gate, up, Activation(limit=7.0, alpha=1.702)), clamped, rtol=1e-5, atol=1e-30)


def test_the_gate_of_gemma_is_gelu_in_its_tanh_form():
    gate, up = np.linspace(-12, 12, 97).astype(np.float32), random(97)
    g = gate.astype(np.float64)
    gelu = 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    np.testing.assert_allclose(gated(gate, up, GELU_GLU), gelu * up, rtol=2e-5, atol=1e-6)


def test_a_projection_is_normalized_before_it_is_added():
    ops = CpuOps(None, Phase.DECODE, Threads(1))
    y, down, residual = random(2, 3), Linear(tensor(random(6, 3))), random(2, 6)
    z = y.astype(np.float64) @ down.weight.data.T.astype(np.float64)
    norm = RmsNorm(tensor(random(6)), 1e-2)
    expected = residual + z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-2) * norm.weight.data
    np.testing.assert_allclose(ops.linear_norm_add(y, down, norm, residual), expected, atol=1e-5)
    np.testing.assert_allclose(ops.linear_norm_add(y, down, norm, residual, 0.25), expected / 4, atol=1e-5)


def test_a_softcap_limits_logits_and_changes_small_ones_little():
    logits = np.array([[1e9, -1e9, 0.0, 1e-3, 12.0]], np.float32)
    expected = 30 * np.tanh(logits.astype(np.float64) / 30)
    np.testing.assert_allclose(CpuOps.softcap(None, logits, 30.0), expected, rtol=1e-6)


def test_values_are_normalized_without_a_weight_and_may_be_the_keys_before_their_norm():
    norm = RmsNorm(tensor(random(8)), 1e-2)
    spec = replace(attention_case(2, 1, 8), q_norm=norm, k_norm=norm, v_epsilon=1e-2)
    q, k, positions = random(20, 16), random(20, 8), np.arange(20, dtype=np.int32)
    batch = Batch(Phase.PREFILL, positions, positions, (np.array([1, 0], np.int32),), np.empty(0, np.int32))
    got = CpuOps(KvCache([spec], 2), Phase.PREFILL, Threads(1)).attention(q, k, k, spec, batch)
    normed = [x.reshape(-1, 8).astype(np.float64) for x in (q, k)]
    normed = [x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) for x in normed]
    heads = [(x * norm.weight.data).reshape(20, -1) for x in normed]
    np.testing.assert_allclose(got, attention_by_hand(*heads, normed[1], 2, 1, 8, 0, None), atol=2e-6)


def test_routing_prefers_the_lower_expert_among_equals_and_applies_the_softmax_to_the_chosen():
    experts, weights = top_k(np.array([[1.0, 3.0, 3.0, 0.0, 2.0]], np.float32), 3)
    assert experts.tolist() == [[1, 2, 4]]
    chosen = np.exp([3.0, 3.0, 2.0])
    np.testing.assert_allclose(weights, [chosen / chosen.sum()], rtol=1e-6)


def attention_case(heads, kv_heads, dim, window=0, sinks=None):
    rope = Rope(np.zeros(dim // 2), 64)  # angle 0 everywhere: other tests cover the rotation
    return Attention(0, heads, kv_heads, dim, rope, window, None if sinks is None else tensor(sinks))


def attention_by_hand(q, k, v, heads, kv_heads, dim, window, sinks):
    """One query and one head at a time, in float64."""
    T = len(q)
    q, k, v = (a.reshape(T, -1, dim).astype(np.float64) for a in (q, k, v))
    y = np.zeros((T, heads, dim))
    for t in range(T):
        first = max(0, t - window + 1) if window else 0
        for h in range(heads):
            kv = h // (heads // kv_heads)
            scores = np.exp(k[first : t + 1, kv] @ q[t, h] / np.sqrt(dim))
            total = scores.sum() + (np.exp(sinks[h]) if sinks is not None else 0)
            y[t, h] = scores @ v[first : t + 1, kv] / total
    return y.reshape(T, -1)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("window", [0, 1, 7, 16, 20])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_equals_its_formula_over_shuffled_blocks_filled_with_nan(phase, heads, kv_heads, window, with_sinks):
    T, dim = 43, 8
    sinks = random(heads) if with_sinks else None
    spec = attention_case(heads, kv_heads, dim, window, sinks)
    cache = KvCache([spec], 9)
    cache.k[0][:], cache.v[0][:] = np.nan, np.nan
    q, k, v = random(T, heads * dim), random(T, kv_heads * dim), random(T, kv_heads * dim)
    table = np.array([7, 2, 5], np.int32)
    positions, no_rows = np.arange(T, dtype=np.int32), np.empty(0, np.int32)
    ops = CpuOps(cache, phase, Threads(1))
    if phase is Phase.PREFILL:
        got = ops.attention(q, k, v, spec, Batch(phase, positions, positions, (table,), no_rows))
    else:
        steps = [Batch(phase, positions[t : t + 1], positions[t : t + 1], (table,), no_rows) for t in range(T)]
        got = np.concatenate(
            [ops.attention(q[t : t + 1], k[t : t + 1], v[t : t + 1], spec, b) for t, b in enumerate(steps)]
        )
    np.testing.assert_allclose(got, attention_by_hand(q, k, v, heads, kv_heads, dim, window, sinks), atol=2e-6)


def test_queries_and_keys_are_rotated_by_their_own_positions():
    spec = attention_case(2, 1, 8)
    rotating = Attention(0, 2, 1, 8, Rope(frequencies(1e4, 8), 64))
    q, k, v = random(20, 16), random(20, 8), random(20, 8)
    positions = np.arange(20, dtype=np.int32)
    batch = Batch(Phase.PREFILL, positions, positions, (np.array([1, 0], np.int32),), np.empty(0, np.int32))
    plain = CpuOps(KvCache([spec], 2), Phase.PREFILL, Threads(1)).attention(q, k, v, spec, batch)
    rotated = CpuOps(KvCache([spec], 2), Phase.PREFILL, Threads(1)).attention(q, k, v, rotating, batch)
    np.testing.assert_array_equal(plain[0], rotated[0])  # position 0 has angle 0
    assert np.abs(plain[1:] - rotated[1:]).max() > 0.05


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt-oss", "llama"])
def test_every_projection_multiplies_its_input_by_rows_of_the_files_matrix(name, tiny, monkeypatch):
    seen = []
    for method in ("_linear", "_expert"):
        original = getattr(CpuOps, method)

        def record(self, x, linear, *expert, original=original):
            y = original(self, x, linear, *expert)
            seen.append((linear, x if x.ndim == 1 else x[-1], y if y.ndim == 1 else y[-1], *expert))
            return y

        monkeypatch.setattr(CpuOps, method, record)
    cpu_runner(tiny(name)).logits(prefill([5, 9, 2, 77, 30]))
    files = {t.name: t for t in gguf.GGUFReader(tiny(name)).tensors}
    assert len(seen) > 10
    for linear, x, y, *expert in seen:
        base, _, rows = linear.weight.name.partition("[")
        matrix = gguf.quants.dequantize(files[base].data, files[base].tensor_type).astype(np.float64)
        start = int(rows.split(":")[0]) if rows else 0
        row = len(y) // 3
        weights = matrix[expert[0], row] if expert else matrix[start + row]
        bias = 0.0
        if linear.bias is not None:
            values = gguf.quants.dequantize(files[linear.bias.name].data, files[linear.bias.name].tensor_type)
            bias = values[expert[0], row] if expert else values[row]
        assert y[row] == pytest.approx(weights @ x + bias, abs=2e-4), linear.weight.name


def test_experts_are_added_by_their_weights():
    ops = CpuOps(None, Phase.DECODE, Threads(1))
    down = Linear(tensor(random(4, 6, 3)), tensor(random(4, 6)))
    h, residual = random(2, 2, 3), random(2, 6)
    routes = Routes(np.array([[3, 1], [0, 3]]), np.array([[0.75, 0.25], [0.5, 0.5]], np.float32))
    expected = residual.astype(np.float64)
    for t in range(2):
        for j in range(2):
            e = routes.experts[t, j]
            expected[t] += routes.weights[t, j] * (down.weight.data[e] @ h[t, j] + down.bias.data[e])
    np.testing.assert_allclose(ops.experts_add(h, routes, down, residual), expected, atol=1e-5)
