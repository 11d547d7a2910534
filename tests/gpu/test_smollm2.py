"""SmolLM2 on the GPU compared with llama.cpp: log-probabilities and greedy choices.

The references are in `tests/data/smollm2_llama_cpp.npz`: llama.cpp's answers from the same weights
with exact products (`make_smollm2_golden.py`). Prefill computes a prompt's last token with f16
products: differences of hundredths of a nat. Decode computes the tokens after it with 8-bit
activations, as llama.cpp does with the published file; the bounds are those of the CPU suite's
comparison, which explains them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.gpu.served import answer, load
from tests.models import GREEDY, decode, prefill
from worker.engine.kv_blocks import blocks_for
from worker.ops import KV_BLOCK

GOLDEN = Path(__file__).parents[1] / "data" / "smollm2_llama_cpp.npz"
PREFILL_MEDIAN, TOP_MEDIAN, CHOSEN_MEDIAN = 0.02, 0.12, 0.06
FLIPS, FLIP_GAP = 0.1, 0.5


@pytest.fixture(scope="module")
def golden():
    """By prompt name: prompt [T], ids [steps], top [steps, 20], logprobs [steps, 20]."""
    with np.load(GOLDEN) as file:
        names = dict.fromkeys(key.rpartition("/")[0] for key in file.files)
        return {n: {k: file[f"{n}/{k}"] for k in ("prompt", "ids", "top", "logprobs")} for n in names}


@pytest.fixture(scope="module")
def loaded(gpu, smollm2_here):
    return load(smollm2_here, context=1024)


def logprobs_of(runner, prompt, generated):
    """Log-probabilities [steps, V] of each next token, with the golden ids as input."""
    table = np.random.default_rng(len(prompt)).permutation(runner.kv_blocks).astype(np.int32)
    table = table[: blocks_for(len(prompt) + len(generated) + KV_BLOCK)]
    rows = [runner.logits(prefill(prompt, table=table, rows=[len(prompt) - 1]))]
    rows += [runner.logits(decode(token, len(prompt) + i, table)) for i, token in enumerate(generated[:-1])]
    logits = np.concatenate(rows).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_log_probabilities_equal_llama_cpps_within_8_bits(loaded, golden, record_property):
    first, top, chosen, flips, steps = [], [], [], [], 0
    for name, of in golden.items():
        ours = logprobs_of(loaded.engine._runner, of["prompt"].tolist(), of["ids"].tolist())
        differences = np.abs(np.take_along_axis(ours, of["top"].astype(np.int64), axis=1) - of["logprobs"])
        first += differences[0].tolist()
        top += differences[1:].ravel().tolist()
        chosen += differences[1:, 0].tolist()
        steps += len(ours)
        other = np.flatnonzero(ours.argmax(axis=1) != of["ids"]).tolist()
        flips += [(name, step, float(np.subtract(*of["logprobs"][step, :2]))) for step in other]
    record_property(
        "SmolLM2 against llama.cpp",
        (
            f"{steps} steps; |Δ log p| of the top 20, median: prefill {np.median(first):.4f} nat, "
            f"decode {np.median(top):.4f} (chosen {np.median(chosen):.4f}); {len(flips)} other greedy choices"
        ),
    )
    assert np.median(first) < PREFILL_MEDIAN
    assert np.median(top) < TOP_MEDIAN
    assert np.median(chosen) < CHOSEN_MEDIAN
    assert len(flips) < FLIPS * steps
    assert all(gap < FLIP_GAP for *_, gap in flips), flips


def test_greedy_answers_equal_llama_cpps_up_to_a_near_tie(loaded, golden):
    same = 0
    for name, of in golden.items():
        wanted = of["ids"].tolist()
        ours = answer(loaded, of["prompt"].tolist(), GREEDY, len(wanted))
        differing = [i for i, pair in enumerate(zip(ours, wanted, strict=True)) if pair[0] != pair[1]]
        same += not differing
        if differing:
            best, second = of["logprobs"][differing[0], :2]
            assert best - second < FLIP_GAP, (name, differing[0])
    assert same > 0.5 * len(golden)
