"""Full-size model files and helpers of their tests; `conftest.py` has the fixture.

The files are in `full-size/` of the worker's cache folder: `suite.py --synth` writes those of SYNTH,
`tests/full_size_models.py` the others. Tests of a missing file are skipped.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.full_size_models import FULL_SIZE
from worker.config import load_settings

SYNTH = ("qwen2.5-0.5b", "llama-3.2-1b", "phi-3-mini", "gpt-oss-20b")
MODELS = (*SYNTH, *FULL_SIZE)
CONTEXT = 4096


def path_of(model):
    """The model's file; skip the test if it is missing."""
    path = load_settings().hub.cache / "full-size" / f"{model}.gguf"
    if not path.exists():
        writes = "suite.py --synth TOOL" if model in SYNTH else "python -m tests.full_size_models"
        pytest.skip(f"no {path.name} in {path.parent.name}/ of the cache; {writes} writes it")
    return path


def random_ids(full, count, seed=0):
    return np.random.default_rng(seed).integers(0, full.loaded.vocab_size - 8, count).tolist()


def relative(found, exact):
    return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact))
