"""The facts of a GPU's numerics name what decides bits, and change when one of them does."""

from __future__ import annotations

from types import SimpleNamespace

from worker.gpu.numerics import numerics


def test_the_facts_are_flat_strings_equal_for_equal_workers():
    facts = numerics("sm_90", "13.0")
    assert facts == numerics("sm_90", "13.0")
    assert all(isinstance(value, str) and value for value in facts.values())
    assert (facts["backend"], facts["compute_capability"], facts["nvrtc"]) == ("cuda", "90", "13.0")
    assert "attention_prefill.cu" in facts["defines"]
    assert "-DSEGMENT=256" in facts["defines"]
    assert {"attention_segment", "decode_splits", "logprob_slices", "product_splits"} <= facts.keys()


def test_another_device_compiler_kernel_or_constant_has_other_facts(tmp_path, monkeypatch):
    first = numerics("sm_90", "13.0")
    assert numerics("sm_100", "13.0") != first
    assert numerics("sm_90", "13.1") != first
    module = SimpleNamespace(__name__="worker.gpu.k", INSTANTIATIONS=(("k.cu", "k"),), FIXED_ORDERS={"k": "in turn"})
    monkeypatch.setattr("worker.gpu.numerics.launcher_modules", lambda: (module,))
    monkeypatch.setattr("worker.gpu.numerics.resources.files", lambda _: tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "k.py").write_text("SPLITS = 2\n")
    (tmp_path / "kernels" / "k.cu").write_text("int k;\n")
    before = numerics("sm_90", "13.0")
    assert before["k"] == "in turn"
    (tmp_path / "kernels" / "k.cu").write_text("int edited;\n")
    edited = numerics("sm_90", "13.0")
    assert edited["sources"] != before["sources"]
    (tmp_path / "k.py").write_text("SPLITS = 3\n")
    assert numerics("sm_90", "13.0")["sources"] != edited["sources"]
