"""The planned activation memory against dry runs of both phases, at tiny and full size, without a GPU.

A dry run allocates as a runner does, but no memory: the widths of a model are enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.full_size_models import FULL_SIZE
from tests.tiny_models import TINY, tensors_of
from worker.adapters import bind
from worker.adapters.hparams import read_hparams
from worker.backend import Plan
from worker.cpu.backend import CpuBackend
from worker.gguf_file import GgufFile
from worker.gpu.attention import AttentionMemory, table_bytes
from worker.gpu.backend import _MARGIN, GpuBackend, batch_rows
from worker.gpu.decode_attention import DecodeAttention
from worker.gpu.decode_ops import DecodeOps
from worker.gpu.glu_bounds import GluBounds
from worker.gpu.launch import dry_run
from worker.gpu.layouts import BlockMatrix, is_vector, stored_type
from worker.gpu.prefill_attention import PrefillAttention
from worker.gpu.prefill_ops import PrefillOps
from worker.gpu.prefill_state import chunks_at_most
from worker.gpu.runner import _empty_step, rows_at_most
from worker.model import ModelOptions
from worker.ops import Batch, Phase, QTensor
from worker.quants import Q8_0

CONTEXT, MIB = 1024, 1 << 20
PROCESSORS, MAX_SHARED = 132, 227 << 10  # of an H100
POOL_SLACK = 9 / 8  # of the runner's pools over the dry runs
VOCABULARY = 151936
FULL = {
    "qwen3moe": FULL_SIZE["qwen3-30b-a3b"],
    "qwen3": FULL_SIZE["qwen3-4b"],
    "gemma3": FULL_SIZE["gemma3-4b"],
    "gemma4-experts": FULL_SIZE["gemma4-26b-a4b"],
    "gemma4-shared": replace(  # E2B
        TINY["gemma4-shared"],
        layers=35,
        width=1536,
        heads=8,
        ffn=6144,
        windowed=(True, True, True, True, False) * 7,
        shared_kv=20,
        layer_input=256,
        big_vocabulary=FULL_SIZE["gemma4-31b"].vocabulary,
        metadata={
            **TINY["gemma4-shared"].metadata,
            "attention.sliding_window": 512,
            "attention.sliding_window_pattern": [True, True, True, True, False] * 7,
            "attention.shared_kv_layers": 20,
            "embedding_length_per_layer_input": 256,
            "feed_forward_length": [6144] * 15 + [12288] * 20,
        },
    ),
    "mistral": FULL_SIZE["mistral-7b"],
    "mixtral": replace(  # 8x7B
        FULL_SIZE["mistral-7b"], experts=8, metadata={**TINY["mixtral"].metadata, "expert_used_count": 2}
    ),
    "gpt-oss": replace(TINY["gpt-oss"], experts=32, width=2880, heads=64, kv_heads=8, ffn=2880),  # 20B
    "llama": replace(TINY["llama"], width=2048, heads=32, kv_heads=8, ffn=8192),  # 3.2 1B
    "qwen2": replace(TINY["qwen2"], width=896, heads=14, kv_heads=2, ffn=4864),  # 2.5 0.5B
}
"""Shapes by the tiny model with the same metadata. Two layers are bound, six if they differ, or all if they have
inputs of their own: all layers use the memory of these in turn."""


class Memory:
    """Device memory of a dry run: sizes are added up."""

    def __init__(self):
        self.nbytes = 0

    def reserve(self, nbytes, purpose):
        self.nbytes += nbytes
        return self

    def array(self, shape, dtype):
        return absent(shape, dtype)


@dataclass
class State:
    """The inputs of a prefill batch and of a decode step."""

    slots: int

    def __post_init__(self):
        self.tokens, self.positions, self.row_slots, self.wanted = (absent((4096,), np.int32) for _ in range(4))
        self.count, self.wanted_count, self.rows, self.params = (absent((1,), np.int32) for _ in range(4))
        self.blocks, self.chunks = CONTEXT // 16, chunks_at_most(self.slots)
        self.tables = absent((self.slots, CONTEXT // 16), np.int32)

    def slots_of_rows(self, rows):
        return self.row_slots[:rows] if self.slots > 1 or rows > 1 else None


class Cache:
    kv_type = "f16"

    def layer(self, layer):
        return None, None


class Absent(np.ndarray):
    """An array whose elements are one element; uploads to it do nothing."""

    def set(self, values):
        assert np.shape(values) == self.shape


def absent(shape, dtype):
    return Absent(shape, dtype, np.zeros(1, dtype), strides=(0,) * len(shape))


def upload(info, scale=1.0):
    """A tensor whose planes have no memory."""
    if is_vector(info):
        return QTensor(info.name, info.shape, info.kind, absent(info.shape, np.float32))
    kind = stored_type(info.kind)
    return QTensor(info.name, info.shape, kind, BlockMatrix(kind, (None,) * 4))


def full_size(name, tiny):
    """The tiny file's metadata with the names and shapes of `FULL[name]`."""
    file = GgufFile.open(tiny(name))
    shape = replace(
        FULL[name],
        layers=FULL[name].layers if FULL[name].shared_kv else 6 if FULL[name].windowed else 2,
        context=CONTEXT,
    )
    numbers = {
        **{"attention.head_count_kv": shape.kv_heads, "feed_forward_length": shape.ffn},
        **{
            key: np.array(each)[: shape.layers] if isinstance(each, list) else each
            for key, each in shape.metadata.items()
        },
        **{"block_count": shape.layers, "context_length": CONTEXT, "embedding_length": shape.width},
        **{"attention.head_count": shape.heads},
        **{"attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim},
        **{"rope.dimension_count": shape.head_dim},
    }
    if shape.experts:
        numbers |= {"expert_count": shape.experts, "expert_feed_forward_length": shape.expert_ffn or shape.ffn}
    file.metadata.update({f"{shape.arch}.{key}": value for key, value in numbers.items()})
    norm = file.tensors["output_norm.weight"]
    divisors = {each: file.tensors[each] for each in shape.rope_tensors}
    file.tensors = divisors if shape.windowed else {}
    for tensor in tensors_of(shape):
        if tensor.shape == (1,):  # optional scales of layers, which loading reads
            continue
        is_tiny = tensor.name in ("token_embd.weight", "output.weight") and not shape.big_vocabulary
        rows = VOCABULARY if is_tiny else tensor.shape[0]
        kind = Q8_0 if tensor.quantized else norm.kind
        file.tensors[tensor.name] = replace(norm, name=tensor.name, shape=(rows, *tensor.shape[1:]), kind=kind)
    return file


@dataclass(frozen=True)
class Need:
    """Bytes of the dry runs of both phases, and of the memory that attention reserves."""

    prefill: int
    decode: int
    workspace: int

    @property
    def in_all(self):
        return POOL_SLACK * (self.prefill + self.decode) + self.workspace


def need_of(file, max_running, context=CONTEXT, *, wgmma=False):
    """Dry runs of a chunk and of the largest decode step, as a runner has them."""
    model, _ = bind(file, ModelOptions(context), upload)
    memory, rows = Memory(), rows_at_most(max_running, drafts=False)[0]
    memory.reserve(4 * chunks_at_most(max_running) * read_hparams(file).vocab_size, None)  # of logits
    shared = AttentionMemory(memory, Cache())
    prefill_attention, bounds = PrefillAttention(shared, PROCESSORS), GluBounds(memory, len(model.layers))
    decode_attention = DecodeAttention(shared, rows, PROCESSORS, MAX_SHARED)
    state = State(max_running)
    chunk = np.zeros(backend_of(wgmma=wgmma).batch_rows, np.int32)
    prompt = Batch(Phase.PREFILL, chunk, chunk, (chunk[:1],), chunk[: state.chunks])

    def prefill(kernels, pool):
        model.forward(PrefillOps(kernels, pool, prefill_attention, bounds, state), prompt)

    def decode(kernels, pool):
        model.forward(DecodeOps(kernels, pool, decode_attention, state, MAX_SHARED), _empty_step(rows))

    return Need(dry_run(prefill, wgmma=wgmma).pool_bytes, dry_run(decode).pool_bytes, memory.nbytes)


def backend_of(processors=PROCESSORS, *, wgmma):
    """A backend without a device, which plans do not need."""
    backend = object.__new__(GpuBackend)
    backend.batch_rows = batch_rows(0, processors, wgmma=wgmma)
    return backend


def planned(file, max_running, *, wgmma=False):
    """The plan's bytes without the driver's share."""
    return overhead(file, read_hparams(file), max_running, wgmma=wgmma) - _MARGIN


def overhead(file, hp, max_running, context=CONTEXT, *, wgmma=False):
    model, _ = bind(file, ModelOptions(context))
    return backend_of(wgmma=wgmma).overhead_bytes(model, hp, max_running)


@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("max_running", [1, 8, 256])
@pytest.mark.parametrize("name", FULL)
def test_the_plan_of_a_full_size_model_is_an_upper_bound_and_not_far_above(name, max_running, wgmma, tiny):
    with full_size(name, tiny) as file:
        need, allowed = need_of(file, max_running, wgmma=wgmma), planned(file, max_running, wgmma=wgmma)
    print(f"{name}, {max_running}: needs {need.in_all / MIB:,.0f} MiB, planned {allowed / MIB:,.0f} MiB, {need}")
    assert need.in_all <= allowed < 8 * need.in_all


@pytest.mark.parametrize("max_running", [1, 8, 256])
@pytest.mark.parametrize("name", sorted(set(TINY) - {"llama3-rope", "phi3-longrope"}))
def test_the_plan_of_a_tiny_model_is_an_upper_bound(name, max_running, tiny):
    with GgufFile.open(tiny(name)) as file:
        assert need_of(file, max_running).in_all <= planned(file, max_running)


def test_the_plan_of_a_mixture_counts_the_width_of_the_active_experts(tiny):
    """30B-A3B: 8 experts of 768, not of the 6,144 of its dense FFN: 504 MiB a chunk of 1,024."""
    with full_size("qwen3moe", tiny) as file:
        hp = read_hparams(file)
        narrow, wide = (overhead(file, each, 1) for each in (hp, replace(hp, expert_feed_forward_length=0)))
    assert (hp.ffn_width, hp.experts_width) == (8 * 768, 8 * 2048)
    rows = 1024 + 1  # of a chunk and of a decode step
    assert wide - narrow == 6 * 2 * rows * 8 * (6144 - 768)


def test_the_plan_of_a_mixture_counts_a_wider_ffn_beside_the_experts(tiny):
    with GgufFile.open(tiny("granitemoe-shared")) as file:
        hp = read_hparams(file)
        assert (hp.ffn_width, hp.expert_shared_feed_forward_length) == (3 * 256, 512)
        narrow, wide = (overhead(file, replace(hp, expert_shared_feed_forward_length=s), 1) for s in (768, 8192))
    assert wide - narrow == 6 * 2 * (1024 + 1) * (8192 - 768)


@pytest.mark.parametrize("context", [64, 448])
@pytest.mark.parametrize("name", sorted(set(TINY) - {"llama3-rope", "phi3-longrope"}))
def test_the_plan_counts_exactly_the_tables_that_attention_uploads(name, context, tiny, monkeypatch):
    uploaded = []
    monkeypatch.setattr(Absent, "set", lambda array, _: uploaded.append(array.nbytes))
    monkeypatch.setattr(GluBounds, "of", lambda *_: absent((4,), np.float32))
    with GgufFile.open(tiny(name)) as file:
        need_of(file, 1, context)
        planned_tables = table_bytes(layer.attention for layer in bind(file, ModelOptions(context))[0].layers)
    assert planned_tables == sum(uploaded) > 0


@pytest.mark.parametrize(("name", "tables"), [("gemma3", 2), ("llama", 1)])
def test_the_plan_counts_the_tables_of_the_configured_context(name, tables, tiny):
    """Gemma 3 4B has two RoPE tables of 256 f32 a position: 268 MB at 131,072 positions."""
    with full_size(name, tiny) as file:
        hp = read_hparams(file)
        for backend in (backend_of(wgmma=False), CpuBackend()):
            long, short = (
                backend.overhead_bytes(bind(file, ModelOptions(context))[0], hp, 1) for context in (131072, 1024)
            )
            assert long - short == tables * 4 * hp.head_dim * (131072 - 1024)


@pytest.mark.parametrize(("used", "width", "widest"), [(8, 768, 8 * 768), (2, 768, 32 * 128), (8, 0, 8 * 6144)])
def test_the_plan_on_the_cpu_counts_the_widest_activation(used, width, widest, tiny):
    with full_size("qwen3moe", tiny) as file:
        hp = replace(read_hparams(file), vocab_size=1, expert_used_count=used, expert_feed_forward_length=width)
        model, _ = bind(file, ModelOptions(CONTEXT))
    assert CpuBackend().overhead_bytes(model, hp, 1) == 4 * CONTEXT * 128 + 4 * 64 * 4 * widest


def test_a_dense_model_counts_its_ffn(tiny):
    with full_size("qwen3", tiny) as file:
        hp = read_hparams(file)
    assert (hp.ffn_width, hp.experts_width) == (9728, 0)


def plan_of(hparams, *weights):
    """A plan of which the weights and their use matter."""
    return Plan(hparams, ModelOptions(CONTEXT), (), {}, weights, (), 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("parameters", "processors", "wgmma", "chunk"),
    [
        *((3.7e9, 132, True, 4096), (8e9, 132, True, 2048), (12e9, 132, True, 1024), (31e9, 132, True, 512)),
        *((3.7e9, 16, True, 512), (8e9, 16, True, 256), (8e9, 108, False, 512), (3.7e9, 132, False, 1024)),
    ],
)
def test_the_chunk_shrinks_until_a_cancellation_need_not_wait_longer(parameters, processors, wgmma, chunk):
    backend = backend_of(processors, wgmma=wgmma)
    backend._kernels = SimpleNamespace(wgmma=wgmma, processors=processors)
    weight = SimpleNamespace(name="blk.0.ffn_down.weight", shape=(int(parameters), 1), is_table=False)
    embedding = SimpleNamespace(name="token_embd.weight", shape=(10**10, 1), is_table=False)
    hparams = SimpleNamespace(expert_count=0, expert_used_count=0)
    assert backend.prefill_chunk(plan_of(hparams, weight, embedding)) == chunk


def test_of_experts_those_in_use_count_and_a_smaller_chunk_that_is_set_needs_less_memory():
    backend = backend_of(wgmma=True)
    backend._kernels = SimpleNamespace(wgmma=True, processors=132)
    experts = SimpleNamespace(name="blk.0.ffn_up_exps.weight", shape=(32, 10**9), is_table=False)
    hparams = SimpleNamespace(expert_count=32, expert_used_count=4)
    assert backend.prefill_chunk(plan_of(hparams, experts)) == 4096


def test_a_batch_has_the_rows_that_fill_the_device_or_fewer_by_a_setting():
    assert [batch_rows(chunk, 132, wgmma=True) for chunk in (0, 512, 4096)] == [4096, 512, 4096]
    assert [batch_rows(chunk, 16, wgmma=True) for chunk in (0, 256, 4096)] == [512, 256, 512]
    assert [batch_rows(chunk, 132, wgmma=False) for chunk in (0, 4096)] == [1024, 1024]
