"""The order of a load: what is refused is refused before it costs anything, and nothing of it stays."""

from __future__ import annotations

import gc

import pytest

from worker import runtime
from worker.config import EngineSection, ModelSection
from worker.errors import ModelLoadFailed


def no_tokenizer(metadata, vocab):
    raise ModelLoadFailed("the merges don't fit", "tokenizer.ggml.merges", "pairs")


def test_a_tokenizer_that_can_t_be_built_is_refused_before_a_weight_is_read(tiny, monkeypatch):
    heard = []
    monkeypatch.setattr(runtime, "build_tokenizer", no_tokenizer)
    with pytest.raises(ModelLoadFailed, match="the merges don't fit"):
        runtime.load(tiny("qwen2"), ModelSection(), EngineSection(backend="cpu"), lambda *done: heard.append(done))
    assert heard == []
    assert gc.isenabled()


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_progress_is_heard_up_to_the_last_byte(tiny, name):
    heard = []
    runtime.load(tiny(name), ModelSection(), EngineSection(backend="cpu"), lambda *done: heard.append(done))
    assert heard == sorted(heard)
    assert heard[-1][0] == heard[-1][1]
    assert gc.isenabled()


def test_where_uploads_go_on_aside_the_tokenizer_is_built_after_they_began(tiny, monkeypatch):
    order = []
    cpu = runtime.open_backend(EngineSection(backend="cpu"))
    cpu.uploads_aside = True
    build = runtime.build_tokenizer
    monkeypatch.setattr(runtime, "open_backend", lambda engine: cpu)
    monkeypatch.setattr(runtime, "build_tokenizer", lambda *args: order.append("tokenizer") or build(*args))
    loaded = runtime.load(tiny("qwen2"), ModelSection(), EngineSection(), lambda *done: order.append("weights"))
    assert order[0] == "weights"
    assert order[-1] == "tokenizer"
    assert loaded.tokenizer.encode("a")
