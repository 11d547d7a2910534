"""Compare every architecture, tensor type and pre-tokenizer with a reference, for docs/models.md.

    python -m tests.comparisons [architectures] [types] [tokenizers] [--only NAME…] [--gpu] [--missing]

Each comparison is that of a test, which states its bound; this command records the largest
difference. The results replace those of the same comparison in `benchmarks/results/models/`.
Without --gpu the CPU is compared; with it the GPU with the CPU, on a card, or else in the emulator
(minutes an architecture, most of them the compilation of kernels). --missing leaves out what is
recorded. Afterwards run `python -m benchmarks.models_report --into docs/models.md`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models_report import (
    ARCHITECTURE,
    AS_F32,
    CPU,
    EMULATOR,
    LLAMA_CPP,
    RECORD,
    TOKENIZER,
    TYPE,
    Comparison,
    read_record,
    write_record,
)
from tests.changed_files import changed_copy
from tests.goldens import CASES, golden_model, load_golden, relative_error
from tests.gpu.suite import why_no_gpu
from tests.llama_cpp import LlamaCpp, write_f32_copy
from tests.models import cpu_runner, decode, prefill
from tests.text.pre_tokenizer_cases import TIKTOKEN, ids_of_llama_cpp, ids_of_tiktoken, trained_metadata
from tests.text.small import tokenizer_of
from tests.tiny_models import TINY, make_tiny
from worker.quants import QUANT_TYPES
from worker.text.pre_tokenizers import PRE_TOKENIZERS

CONTEXT, TOKENS, STEPS = 512, 90, 8
GPU_CONTEXT, GPU_TOKENS = 64, 40
NO_YARN = {"gpt-oss.rope.scaling.type": None, "gpt-oss.rope.scaling.factor": None}
"""llama.cpp rounds YaRN's bounds for gpt-oss."""
KERNEL_CACHE = Path.home() / ".cache" / "worker" / "kernels"
PARTS = {"architectures": ARCHITECTURE, "types": TYPE, "tokenizers": TOKENIZER}

Task = tuple[str, str, str, str, Callable[[Path], Iterator[Comparison]]]
"""Part, name, model, device and the comparisons."""


def prompt(tokens: int) -> list[int]:
    """Token ids that every tiny vocabulary has."""
    return [(37 * i + 5) % 250 for i in range(tokens)]


def from_llama_cpp(path: Path, theirs: Path | None = None) -> float:
    """Largest |Δ log-probability| of llama.cpp's best 20 tokens after a prompt, in nat.

    `theirs`: the file that llama.cpp reads, by default the same.
    """
    ids = prompt(TOKENS)
    with LlamaCpp(theirs or path, context=CONTEXT) as llama_cpp:
        expected = dict(llama_cpp.next_logprobs(ids))
    logits = cpu_runner(path, context=CONTEXT).logits(prefill(ids, rows=[len(ids) - 1]))[0].astype(np.float64)
    found = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    return float(max(abs(found[token] - logprob) for token, logprob in expected.items()))


def architecture_on_cpu(name: str, folder: Path) -> Iterator[Comparison]:
    """A tiny model with F32 weights against llama.cpp, and one of many types against transformers."""
    arch = TINY[name].arch
    for case, golden in CASES.items():
        if golden.model == name:
            expected = load_golden(case)
            runner = cpu_runner(golden_model(case, folder), sliding_window=golden.window)
            logits = runner.logits(prefill(expected.prompt.tolist(), rows=expected.positions.tolist()))
            error = relative_error(logits, expected.logits)
            of, test = ("transformers", expected.versions), "tests/adapters/test_hf_goldens.py"
            yield Comparison(ARCHITECTURE, arch, case, CPU, *of, error, "relative", len(expected.positions), test)
    if name == "gpt-oss-yarn":
        return
    path = make_tiny(name, folder / f"{name}-f32.gguf", quant="F32")
    test = "tests/adapters/test_llama_cpp.py"
    if arch == "gpt-oss":
        path = changed_copy(path, folder / "no-yarn.gguf", metadata=NO_YARN)
        test = "tests/adapters/test_gpt_oss.py"
    if arch in ("gemma3", "gemma4"):  # llama.cpp's GELU is a table of f16
        test = f"tests/adapters/test_{arch}.py"
    difference = from_llama_cpp(path)
    yield Comparison(ARCHITECTURE, arch, name, CPU, *llama_cpp(), difference, "nat", 20, test)


def type_on_cpu(name: str, folder: Path) -> Iterator[Comparison]:
    """A tiny llama whose matrices are of one type, which llama.cpp also reads as F32."""
    path = make_tiny("llama", folder / "model.gguf", quant=name)
    test, (_, versions) = "tests/adapters/test_llama_cpp.py", llama_cpp()
    for reference, theirs in ((LLAMA_CPP, path), (AS_F32, write_f32_copy(path, folder / "f32.gguf"))):
        difference = from_llama_cpp(path, theirs)
        yield Comparison(TYPE, name, "llama", CPU, reference, versions, difference, "nat", 20, test)


def tokenizer_on_cpu(pre: str, metadata: dict[str, Any], folder: Path) -> Iterator[Comparison]:
    """The number of strings whose ids differ."""
    if pre in TIKTOKEN:
        expected, of = ids_of_tiktoken(pre, metadata), ("tiktoken", f"tiktoken {version('tiktoken')}")
    else:
        (expected, _), of = ids_of_llama_cpp(pre, metadata, folder), llama_cpp()
    tokenizer = tokenizer_of(metadata | {"tokenizer.ggml.pre": pre})
    different = sum(tokenizer.encode(text) != ids for text, ids in expected.items())
    test = "tests/text/test_pre_tokenizer_names.py"
    yield Comparison(TOKENIZER, pre, "", CPU, *of, different, "strings", len(expected), test)


class Gpu:
    """The card, or the emulator."""

    def __init__(self) -> None:
        reason = why_no_gpu()
        cache = KERNEL_CACHE
        if reason is not None:
            from tests.gpu.emulator.compiler import why_no_compiler
            from tests.gpu.emulator.host_cupy import installed

            if missing := why_no_compiler():
                raise SystemExit(f"neither a GPU ({reason}) nor the emulator ({missing})")
            cache = KERNEL_CACHE.with_name("emulated-kernels")
            cache.mkdir(parents=True, exist_ok=True)
            sys.modules.update(installed(cache, backwards=False))
        import cupy

        from worker.gpu.compiler import Kernels

        card = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode() if reason is None else ""
        self.device = card or EMULATOR
        self._kernels = Kernels(cache)

    def compare(self, part: str, name: str, model: str, path: Path, test: str) -> Iterator[Comparison]:
        """Logits of each row of a prompt and of decode steps, against the CPU's in f32."""
        from tests.gpu.loaded import gpu_runner
        from worker.gpu.memory import DeviceMemory

        table, ids = np.arange(GPU_CONTEXT // 16, dtype=np.int32), prompt(GPU_TOKENS + STEPS)
        settings = {"prefill_tokens": GPU_TOKENS // 16 * 16, "logit_rows": GPU_TOKENS}
        runner = gpu_runner(path, self._kernels, DeviceMemory(), context=GPU_CONTEXT, **settings)
        twin = cpu_runner(path, context=GPU_CONTEXT)
        batch = prefill(ids[:GPU_TOKENS], table=table, rows=list(range(GPU_TOKENS)))
        found, expected = runner.logits(batch), twin.logits(batch)
        errors = [relative_error(a[None], b[None]) for a, b in zip(found, expected, strict=True)]
        steps = []
        for at in range(GPU_TOKENS, GPU_TOKENS + STEPS):
            one = decode(ids[at], at, table)
            steps.append(relative_error(runner.logits(one), twin.logits(one)))
        for phase, values in (("prefill", errors), ("decode", steps)):
            yield Comparison(part, name, model, self.device, phase, "", max(values), "relative", len(values), test)


def architecture_on_gpu(gpu: Gpu, name: str, folder: Path) -> Iterator[Comparison]:
    """A tiny model of Q8_0: every architecture then uses the same few kernels."""
    path = make_tiny(name, folder / f"{name}.gguf", quant="Q8_0")
    yield from gpu.compare(ARCHITECTURE, TINY[name].arch, name, path, "tests/gpu/test_runner.py")


def type_on_gpu(gpu: Gpu, name: str, folder: Path) -> Iterator[Comparison]:
    """A tiny llama whose matrices are of one type."""
    path = make_tiny("llama", folder / "model.gguf", quant=name)
    yield from gpu.compare(TYPE, name, "llama", path, "tests/gpu/test_matvec.py")


def llama_cpp() -> tuple[str, str]:
    """The reference and the version of the wheel that contains it."""
    return LLAMA_CPP, f"llama.cpp of xllamacpp {version('xllamacpp')}"


def tasks(on_gpu: bool) -> Iterator[Task]:
    """All comparisons of the CPU, or of the GPU."""
    if on_gpu:
        gpu = Gpu()
        for name in TINY:
            yield ARCHITECTURE, TINY[name].arch, name, gpu.device, lambda at, n=name: architecture_on_gpu(gpu, n, at)
        for kind in QUANT_TYPES:
            yield TYPE, kind.name, "llama", gpu.device, lambda at, n=kind.name: type_on_gpu(gpu, n, at)
        return
    for name in TINY:
        yield ARCHITECTURE, TINY[name].arch, name, CPU, lambda at, n=name: architecture_on_cpu(n, at)
    for kind in QUANT_TYPES:
        yield TYPE, kind.name, "llama", CPU, lambda at, n=kind.name: type_on_cpu(n, at)
    metadata = trained_metadata()
    for pre in PRE_TOKENIZERS:
        yield TOKENIZER, pre, "", CPU, lambda at, n=pre: tokenizer_on_cpu(n, metadata, at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help="by default all")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="architectures, types or names of these")
    parser.add_argument("--gpu", action="store_true", help="compare the GPU, or the emulator, with the CPU")
    parser.add_argument("--missing", action="store_true", help="leave out what is recorded")
    parser.add_argument("--record", type=Path, default=RECORD, help="the file of the results")
    chosen = parser.parse_args()
    parts = [PARTS[part] for part in chosen.parts or PARTS]
    for part, name, model, device, compare in tasks(chosen.gpu):
        record = read_record(chosen.record) if chosen.record.exists() else []
        known = {(each.part, each.name, each.model, each.device) for each in record}
        if part not in parts or (chosen.only and name not in chosen.only and model not in chosen.only):
            continue
        if chosen.missing and (part, name, model, device) in known:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = list(compare(Path(folder)))
        for each in found:
            print(f"{each.part} {each.name} {each.model} on {each.device}: {each.difference:.2g} {each.unit}, "
                  f"{each.cases} cases, {each.reference} {each.versions}", flush=True)  # fmt: skip
        write_record(chosen.record, [*record, *found], datetime.now(UTC).date().isoformat())


if __name__ == "__main__":
    main()
