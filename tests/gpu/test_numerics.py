"""The facts of a GPU's numerics name what decides bits, and change when one of them does."""

from __future__ import annotations

from types import SimpleNamespace

from worker.backend import source_digest
from worker.gpu.numerics import numerics


def test_the_facts_are_flat_strings_equal_for_equal_workers():
    facts = numerics("sm_90", "13.0", wgmma=False)
    assert facts == numerics("sm_90", "13.0", wgmma=False)
    assert all(isinstance(value, str) and value for value in facts.values())
    assert (facts["backend"], facts["compute_capability"], facts["nvrtc"]) == ("cuda", "90", "13.0")
    assert "attention_prefill.cu" in facts["defines"]
    assert "-DSEGMENT=256" in facts["defines"]
    assert {"attention_segment", "decode_splits", "logprob_slices", "product_splits"} <= facts.keys()


def test_another_device_compiler_order_or_source_has_other_facts(monkeypatch):
    first = numerics("sm_90", "13.0", wgmma=False)
    assert numerics("sm_100", "13.0", wgmma=False) != first
    assert numerics("sm_90", "13.1", wgmma=False) != first
    assert numerics("sm_90", "13.0", wgmma=True) != first
    assert first["kv_type"] == "f16"
    assert numerics("sm_90", "13.0", "q8", wgmma=False) == {**first, "kv_type": "q8"}
    module = SimpleNamespace(INSTANTIATIONS=(("k.cu", "k"),), FIXED_ORDERS={"k": "in turn"})
    monkeypatch.setattr("worker.gpu.numerics.launcher_modules", lambda: (module,))
    assert numerics("sm_90", "13.0", wgmma=False)["k"] == "in turn"
    monkeypatch.setattr("worker.gpu.numerics.source_digest", lambda package: f"edited {package}")
    assert numerics("sm_90", "13.0", wgmma=False)["sources"] == "edited gpu"


def test_the_digest_covers_kernels_launchers_adapters_and_rope_and_nothing_else(tmp_path):
    for file in ("gpu/matvec.py", "gpu/kernels/k.cu", "gpu/kernels/k.cuh", "adapters/llama.py", "rope.py"):
        before = source_digest("gpu", tmp_path)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("first\n")
        first = source_digest("gpu", tmp_path)
        (tmp_path / file).write_text("second\n")
        assert len({before, first, source_digest("gpu", tmp_path)}) == 3, file
    before = source_digest("gpu", tmp_path)
    for file in ("cpu/ops.py", "service.py", "gpu/notes.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("other\n")
    assert source_digest("gpu", tmp_path) == before
