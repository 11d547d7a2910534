"""Loading: its order, the memory plan, and what fingerprint and numerics id depend on."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import replace

import pytest

from worker import runtime
from worker.adapters import bind
from worker.adapters.hparams import read_hparams
from worker.config import EngineSection, ModelSection
from worker.cpu.backend import CpuBackend
from worker.engine.kv_blocks import blocks_for
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.gpu.backend import GpuBackend
from worker.gpu.numerics import numerics
from worker.model import ModelOptions
from worker.ops import KV_BLOCK


def no_tokenizer(metadata, vocab):
    raise ModelLoadFailed("the merges don't fit", "tokenizer.ggml.merges", "pairs")


def test_a_tokenizer_that_can_t_be_built_is_refused_before_a_weight_is_read(tiny, monkeypatch):
    reported = []
    monkeypatch.setattr(runtime, "build_tokenizer", no_tokenizer)
    with pytest.raises(ModelLoadFailed, match="the merges don't fit"):
        runtime.load(tiny("qwen2"), ModelSection(), EngineSection(backend="cpu"), lambda *done: reported.append(done))
    assert reported == []
    assert gc.isenabled()


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_progress_is_reported_up_to_the_last_byte(tiny, name):
    reported = []
    runtime.load(tiny(name), ModelSection(), EngineSection(backend="cpu"), lambda *done: reported.append(done))
    assert reported == sorted(reported)
    assert reported[-1][0] == reported[-1][1]
    assert gc.isenabled()


def test_uploads_begin_before_the_tokenizer_and_are_awaited_after_the_runner(tiny, monkeypatch):
    order = []
    backend = runtime.open_backend(EngineSection(backend="cpu"))
    uploader, runner, build = backend.uploader, backend.runner, runtime.build_tokenizer

    @contextmanager
    def recorded_uploader(*args):
        with uploader(*args) as upload:
            yield lambda info, scale: order.append("upload") or upload(info, scale)
        order.append("uploaded")

    monkeypatch.setattr(backend, "uploader", recorded_uploader)
    monkeypatch.setattr(backend, "runner", lambda *args, **ids: order.append("runner") or runner(*args, **ids))
    monkeypatch.setattr(runtime, "open_backend", lambda engine: backend)
    monkeypatch.setattr(runtime, "build_tokenizer", lambda *args: order.append("tokenizer") or build(*args))
    loaded = runtime.load(tiny("qwen2"), ModelSection(), EngineSection())
    assert order[0] == "upload"
    assert order[-3:] == ["tokenizer", "runner", "uploaded"]
    assert loaded.tokenizer.encode("a")


BLOCK, CONTEXT = 1000, 512  # bytes of a KV block; 512 tokens are 32 blocks


@pytest.mark.parametrize(
    ("free", "limit", "blocks"),
    [
        (1_000_000, 0, 32),  # never less than one context
        (1_000_000, 0.0, 32),
        (1_000_000, 0.9, 900),
        (1_000_000, 1.0, 1000),
        (1_000_000, 500_000, 500),
        (1_000_000, 5_000_000, 1000),  # no more than fits
        (20_000, 0.9, 20),  # one context does not fit: all that does
        (999, 0.9, 0),
        (-5, 0.9, 0),
        (1 << 40, 1.0, runtime.MAX_KV_BLOCKS),
    ],
)
def test_the_kv_pool_is_what_the_limit_allows_of_the_free_memory(free, limit, blocks):
    assert runtime._kv_blocks(free, limit, CONTEXT, BLOCK) == blocks


def planned(path, monkeypatch, *, available=1 << 34, context=0, kv_memory="auto", share=None):
    backend = runtime.open_backend(EngineSection(backend="cpu"))
    monkeypatch.setattr(backend, "available_bytes", lambda: available)
    if share is not None:
        monkeypatch.setattr(backend, "kv_share", share)
    with GgufFile.open(path) as file:
        return runtime.plan(file, ModelSection(context=context), backend, kv_memory)


def test_auto_is_one_context_on_the_cpu_and_a_share_of_free_memory_on_a_gpu(tiny, monkeypatch):
    on_cpu = planned(tiny("qwen2"), monkeypatch)
    on_gpu = planned(tiny("qwen2"), monkeypatch, share=GpuBackend.kv_share)
    assert on_cpu.kv_blocks == blocks_for(on_cpu.context)
    free = on_gpu.available - on_gpu.weight_bytes - on_gpu.overhead_bytes
    assert on_gpu.kv_blocks == int(0.9 * free) // (on_gpu.kv_bytes_per_token * KV_BLOCK)
    assert on_gpu.context == on_cpu.context


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma4"])
def test_q8_needs_a_byte_an_element_and_two_a_row(name, tiny):
    with GgufFile.open(tiny(name)) as file:
        model, _ = bind(file, ModelOptions(512))
        f32, f16, q8 = (CpuBackend(kv_type).kv_bytes_per_token(model) for kv_type in ("f32", "f16", "q8"))
    specs = [layer.attention for layer in model.layers]
    assert q8 == sum(2 * spec.n_kv_heads * (spec.head_dim + 2) for spec in specs)
    assert f32 == 2 * f16 == 4 * sum(2 * spec.n_kv_heads * spec.head_dim for spec in specs)
    backend = object.__new__(GpuBackend)
    for kv_type, expected in (("f16", f16), ("q8", q8)):
        backend.kv_type = kv_type
        assert backend.kv_bytes_per_token(model) == expected


@pytest.mark.parametrize(("setting", "stored"), [("f32", "f16"), ("f16", "f16"), ("q8", "q8")])
def test_a_gpu_stores_keys_and_values_in_f16_unless_q8_is_set(setting, stored, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr("worker.gpu.backend.GpuBackend", lambda _, kv_type, chunk: kv_type)
    assert runtime.open_backend(EngineSection(backend="gpu", kv_type=setting)) == stored


def test_max_running_is_the_number_of_slots_and_counts_in_the_memory_plan(tiny):
    loaded = runtime.load(tiny("qwen2"), ModelSection(), EngineSection(backend="cpu", max_running=3))
    assert loaded.engine.settings.max_running == loaded.engine._runner.slots == 3
    backend = runtime.open_backend(EngineSection(backend="cpu"))
    with GgufFile.open(tiny("qwen2")) as file:
        few, many = (runtime.plan(file, ModelSection(), backend, "auto", n).overhead_bytes for n in (1, 256))
    assert few < many


@pytest.mark.parametrize(("context", "factors"), [(0, "long"), (512, "long"), (129, "long"), (128, "short")])
def test_longrope_factors_follow_the_configured_context_whatever_memory_is_free(context, factors, tiny, monkeypatch):
    path = tiny("phi3-longrope")
    ample = planned(path, monkeypatch, context=context)
    needed = ample.weight_bytes + ample.overhead_bytes
    for blocks in (1, 7, 8, 9):
        available = needed + blocks * ample.kv_bytes_per_token * KV_BLOCK
        tight = planned(path, monkeypatch, context=context, available=available)
        assert tight.context == min(ample.context, blocks * KV_BLOCK)
        assert tight.choices["rope_factors"] == ample.choices["rope_factors"] == factors
        assert tight.options == ample.options


def test_the_fingerprint_covers_choices_and_is_the_files_own_without_any(tiny):
    def loaded(name, **section):
        return runtime.load(tiny(name), ModelSection(**section), EngineSection(backend="cpu")).fingerprint

    def of_file(name):
        with GgufFile.open(tiny(name)) as file:
            return file.fingerprint()

    for name in ("qwen2", "llama", "gpt-oss"):
        assert loaded(name, sliding_window="file") == loaded(name) == of_file(name)
    long, short = loaded("phi3-longrope"), loaded("phi3-longrope", context=128)
    assert len({long, short, of_file("phi3-longrope")}) == 3
    assert long == loaded("phi3-longrope", context=200)
    assert loaded("phi3") != loaded("phi3", sliding_window="file")


def test_the_numerics_id_changes_with_every_fact_and_with_nothing_else():
    facts = runtime.open_backend(EngineSection(backend="cpu")).numerics()
    assert {"backend", "numpy", "blas", "machine", "kv_type", "simd", "sources", "llguidance"} == set(facts)
    again = runtime.open_backend(EngineSection(backend="cpu")).numerics()
    assert runtime.numerics_id(again) == runtime.numerics_id(dict(reversed(facts.items())))
    changed = [{**facts, name: "another"} for name in facts]
    f16 = runtime.open_backend(EngineSection(backend="cpu", kv_type="f16")).numerics()
    assert len({runtime.numerics_id(each) for each in (facts, f16, *changed)}) == len(facts) + 2


def test_the_gpus_numerics_name_the_card_the_compiler_and_the_kernels():
    facts = numerics("sm_90", "12.9", wgmma=False)
    assert set(facts.items()) >= {("backend", "cuda"), ("compute_capability", "90"), ("nvrtc", "12.9")}
    assert numerics("sm_90", "12.9", wgmma=False) == facts
    assert runtime.numerics_id(numerics("sm_80", "12.9", wgmma=False)) != runtime.numerics_id(facts)


@pytest.mark.parametrize("change", [{"expert_count": 512}, {"expert_used_count": 17}])
def test_the_gpu_refuses_experts_without_a_kernel_before_a_weight_is_read(change, tiny):
    with GgufFile.open(tiny("gpt-oss")) as file:
        hparams, (model, _) = read_hparams(file), bind(file, ModelOptions(512))
    GpuBackend.check(None, model, hparams)
    with pytest.raises(ModelLoadFailed, match="the GPU's"):
        GpuBackend.check(None, model, replace(hparams, **change))


def test_the_gpu_refuses_a_layer_whose_heads_have_no_kernel(tiny):
    with GgufFile.open(tiny("gpt-oss")) as file:
        hparams, (model, _) = read_hparams(file), bind(file, ModelOptions(512))
    last = model.layers[-1]
    model.layers[-1] = replace(last, attention=replace(last.attention, head_dim=32))
    with pytest.raises(ModelLoadFailed, match="the GPU's"):
        GpuBackend.check(None, model, hparams)
