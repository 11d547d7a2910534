"""What keys and values of 16 and of 8 bits change in log-probabilities, on the CPU, against f32.

    python -m benchmarks.kv_types

Tiny models with random weights, whose attention is sharp and whose logits are wide; the prompts are
those of tests/goldens. Columns: mean and greatest difference of all log-probabilities, in nats, and
the share of positions whose likeliest token differs.
"""

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.goldens import golden_model, load_golden
from tests.models import cpu_runner, prefill
from worker.model import KvType

MODELS = ("qwen2", "phi3", "llama", "gpt-oss", "gemma3", "gemma4", "qwen3moe")


def log_probabilities(path: Path, prompt: list[int], kv_type: KvType) -> npt.NDArray[np.float64]:
    """[T, V] of a prompt's positions."""
    logits = cpu_runner(path, kv_type=kv_type).logits(prefill(prompt)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    normalized: npt.NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return normalized


def main() -> None:
    """Print a row for each model and type."""
    print("| model | type | mean | greatest | other token |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            path, prompt = golden_model(name, Path(folder)), load_golden(name).prompt.tolist()
            exact = log_probabilities(path, prompt, "f32")
            for kv_type in ("f16", "q8"):
                got = log_probabilities(path, prompt, kv_type)
                difference = np.abs(got - exact)
                moved = np.mean(got.argmax(-1) != exact.argmax(-1))
                print(f"| {name} | {kv_type} | {difference.mean():.1e} | {difference.max():.1e} | {moved:.1%} |")


if __name__ == "__main__":
    main()
