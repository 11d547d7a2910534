"""Golden logits of the tiny models, from Hugging Face transformers, in `tests/data/goldens/`.

Imports neither torch nor the worker. `make_goldens.py` writes the vectors; run it again after a
change of `tests/tiny_models.py` that changes a file's bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.tiny_models import make_tiny

FOLDER = Path(__file__).parents[1] / "data" / "goldens"


@dataclass(frozen=True)
class GoldenCase:
    """A tiny model and the length of its prompt; `window` is `ModelOptions.sliding_window`."""

    model: str
    tokens: int = 200
    window: str = "auto"


CASES = {
    "qwen2": GoldenCase("qwen2"),
    "qwen2-untied": GoldenCase("qwen2-untied"),
    "phi3": GoldenCase("phi3"),
    "phi3-window": GoldenCase("phi3", window="file"),
    "phi3-longrope": GoldenCase("phi3-longrope"),  # the long factors: its context of 512 exceeds the original 128
    "gpt-oss": GoldenCase("gpt-oss"),
    "gpt-oss-yarn": GoldenCase("gpt-oss-yarn", tokens=330),
    "llama": GoldenCase("llama"),
    "llama3-rope": GoldenCase("llama3-rope"),
    "llama-biased": GoldenCase("llama-biased"),
    "mistral": GoldenCase("mistral"),
    "mixtral": GoldenCase("mixtral"),
    "mistral3": GoldenCase("mistral3"),
    "mistral3-experts": GoldenCase("mistral3-experts"),
    "qwen3": GoldenCase("qwen3"),
    "qwen3moe": GoldenCase("qwen3moe"),
    "smollm3": GoldenCase("smollm3"),
    "granite": GoldenCase("granite"),
    "granitemoe": GoldenCase("granitemoe"),
    "granitemoe-shared": GoldenCase("granitemoe-shared"),
    "gemma3": GoldenCase("gemma3"),
    "gemma3-27b": GoldenCase("gemma3-27b"),
    "gemma4": GoldenCase("gemma4"),
    "gemma4-experts": GoldenCase("gemma4-experts"),
    "gemma4-shared": GoldenCase("gemma4-shared"),
}


@dataclass(frozen=True)
class Golden:
    """Vectors of a case: `logits[i]` [V] f32 are those at `positions[i]` of `prompt` [T]."""

    prompt: np.ndarray
    positions: np.ndarray
    logits: np.ndarray
    sha256: str
    versions: str


def load_golden(name: str) -> Golden:
    """The vectors of `CASES[name]`."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return Golden(file["prompt"], file["positions"], file["logits"], str(file["sha256"]), str(file["versions"]))


def golden_model(name: str, folder: Path) -> Path:
    """Write the tiny model of `CASES[name]`. Fails if its bytes differ from the golden's."""
    path = make_tiny(CASES[name].model, folder / f"{CASES[name].model}.gguf")
    assert file_sha256(path) == load_golden(name).sha256, f"{name}: not the golden's file; run make_goldens.py"
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def relative_error(logits: np.ndarray, golden: np.ndarray) -> float:
    """The largest over positions of ‖logits - golden‖ / ‖golden‖, both [P, V]."""
    difference = np.linalg.norm(logits.astype(np.float64) - golden, axis=-1)
    return float((difference / np.linalg.norm(golden.astype(np.float64), axis=-1)).max())
