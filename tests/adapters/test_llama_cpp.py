"""SmolLM2 against llama.cpp, prompt by prompt, and a tiny model of every type.

With the published Q4_1 file llama.cpp quantizes activations to 8 bits in every product, which
causes the difference. With the same weights as an F32 file it does not, and the results must be
equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tests.llama_cpp import LlamaCpp, write_f32_copy
from tests.models import cpu_runner, prefill
from tests.smollm2_prompts import PROMPTS, STEPS, prompt_of
from tests.tiny_models import make_tiny
from worker import runtime
from worker.config import EngineSection, ModelSection
from worker.engine import Sequence
from worker.quants import QUANT_TYPES
from worker.sampling import Sampling

NEAR_TIE = 0.05


@pytest.fixture(scope="module")
def worker(smollm2):
    return runtime.load(smollm2, ModelSection(context=1024), EngineSection(backend="cpu"))


def greedy(worker, prompt):
    """The worker's greedy answer: ids and the top-20 log-probabilities of each step."""
    worker.engine.add(
        Sequence("a", prompt, STEPS, Sampling(temperature=0, logprobs=20), worker.tokenizer.vocab.end_ids)
    )
    tokens = []
    while not worker.engine.idle:
        tokens += worker.engine.step()
    return tokens


@pytest.fixture(scope="module")
def answers(worker):
    return [(entry["name"], *((p := prompt_of(entry, worker.tokenizer)), greedy(worker, p))) for entry in PROMPTS]


@dataclass
class Comparison:
    """|Δ log-probability| of the shared top-20 tokens and of the chosen token.

    `flips` are the steps (prompt, index, gap of the top two) at which the greedy choices differ.
    """

    top: list[float]
    chosen: list[float]
    flips: list[tuple[str, int, float]]

    def __str__(self) -> str:
        top, chosen = np.array(self.top), np.array(self.chosen)
        return (
            f"{len(chosen)} steps; top-20: median {np.median(top):.4f} nat, 99 % {np.percentile(top, 99):.4f}; "
            f"chosen: median {np.median(chosen):.4f}; flips {self.flips}"
        )


def compare(answers, model):
    """Compare every step of the answers with llama.cpp's, which continues from the same ids."""
    found = Comparison([], [], [])
    with LlamaCpp(model, context=1024) as llama_cpp:
        for name, prompt, tokens in answers:
            for i, token in enumerate(tokens):
                theirs = llama_cpp.next_logprobs([*prompt, *(t.draw.id for t in tokens[:i])])
                ours = dict(token.draw.top)
                found.top += [abs(logprob - ours[t]) for t, logprob in theirs if t in ours]
                found.chosen += [abs(logprob - ours[t]) for t, logprob in theirs if t == token.draw.id]
                if theirs[0][0] != token.draw.id:
                    (_, best), (_, second) = token.draw.top[:2]
                    found.flips.append((name, i, best - second))
    return found


def test_there_are_twenty_prompts_of_every_kind():
    assert len({entry["name"] for entry in PROMPTS}) == len(PROMPTS) >= 20
    assert {entry["name"].split("-")[0] for entry in PROMPTS} >= {"chat", "code"}


def test_prompts_become_the_same_ids(smollm2, worker):
    with LlamaCpp(smollm2, context=1024) as llama_cpp:
        for entry in PROMPTS:
            text = llama_cpp.apply_template(entry["messages"]) if "messages" in entry else entry["prompt"]
            assert prompt_of(entry, worker.tokenizer) == llama_cpp.tokenize(text, bos=True, special=True), entry["name"]


def test_log_probabilities_on_the_published_file_differ_by_llama_cpps_rounding_alone(smollm2, answers):
    found = compare(answers, smollm2)
    print(found)
    assert len(found.top) > 2000
    assert np.median(found.chosen) < 0.06
    assert np.median(found.top) < 0.12
    assert len(found.flips) < 0.1 * len(found.chosen)


def test_greedy_ids_are_equal_on_the_same_weights_as_f32_except_after_near_ties(smollm2, answers, tmp_path):
    found = compare(answers, write_f32_copy(smollm2, tmp_path / "f32.gguf"))
    print(found)
    assert np.median(found.top) < 0.005
    assert np.percentile(found.top, 99) < 0.02
    assert all(gap < NEAR_TIE for *_, gap in found.flips), found.flips


@pytest.mark.parametrize("kind", [kind.name for kind in QUANT_TYPES if kind.block_size > 1])
def test_a_model_of_any_type_has_llama_cpp_s_log_probabilities(kind, tmp_path):
    """Up to llama.cpp's rounding of activations to 8 bits; an unrelated model is some nats away."""
    path, ids = make_tiny("llama", tmp_path / "model.gguf", quant=kind), [*range(40, 50), 7, 120]
    with LlamaCpp(path, context=512) as llama_cpp:
        expected = dict(llama_cpp.next_logprobs(ids))
    found, unrelated = (
        logprobs_of(each, ids) for each in (path, make_tiny("llama", tmp_path / "other.gguf", seed=1, quant=kind))
    )
    assert max(abs(found[token] - logprob) for token, logprob in expected.items()) < 0.5
    assert max(abs(unrelated[token] - logprob) for token, logprob in expected.items()) > 2


@pytest.mark.parametrize("kind", [kind.name for kind in QUANT_TYPES if kind.block_size > 1])
def test_a_model_of_any_type_has_the_log_probabilities_of_its_weights_as_f32_in_llama_cpp(kind, tmp_path):
    """With F32 weights llama.cpp does not round activations, so that only the order of sums differs."""
    path, ids = make_tiny("llama", tmp_path / "model.gguf", quant=kind), [*range(40, 50), 7, 120]
    with LlamaCpp(write_f32_copy(path, tmp_path / "f32.gguf"), context=512) as llama_cpp:
        expected = dict(llama_cpp.next_logprobs(ids))
    found = logprobs_of(path, ids)
    assert max(abs(found[token] - logprob) for token, logprob in expected.items()) < 1e-3


ARCHITECTURES = (  # "gemma3" is in test_gemma3.py, "gpt-oss" in test_gpt_oss.py
    "granite",
    "granitemoe",
    "granitemoe-shared",
    "llama",
    "llama-biased",
    "llama3-rope",
    "mistral",
    "mistral3",
    "mistral3-experts",
    "mixtral",
    "phi3",
    "phi3-longrope",
    "qwen2",
    "qwen2-biased",
    "qwen2-untied",
    "qwen3",
    "qwen3moe",
    "smollm3",
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tiny_model_of_the_architecture_has_llama_cpp_s_log_probabilities(name, tmp_path):
    path = make_tiny(name, tmp_path / "model.gguf", quant="F32")
    ids = [(37 * i + 5) % 250 for i in range(90)]
    with LlamaCpp(path, context=512) as llama_cpp:
        expected = dict(llama_cpp.next_logprobs(ids))
    found = logprobs_of(path, ids)
    assert max(abs(found[token] - logprob) for token, logprob in expected.items()) < 1e-3


def logprobs_of(path, ids):
    logits = cpu_runner(path, context=512).logits(prefill(ids, rows=[len(ids) - 1]))[0].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
