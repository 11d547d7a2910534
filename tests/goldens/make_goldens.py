"""Write `tests/data/goldens/*.npz`: logits of Hugging Face transformers for the golden cases.

Run `python -m tests.goldens.make_goldens` in a separate environment with torch, transformers and
gguf. The vectors are computed in float64 throughout; with norms and rotations in float32, as
transformers ships, the logits must agree within a fixed bound.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.goldens import CASES, FOLDER, file_sha256, relative_error
from tests.goldens.hf_models import float64_throughout, load, logits
from tests.tiny_models import make_tiny

# Both sides of every window and original length, then every seventh.
EDGES = {1, 2, 30, 31, 32, 33, 45, 46, 47, 48, 63, 64, 126, 127, 128, 129, 254, 255, 256, 257}
VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__}, gguf {version('gguf')}"


def prompt_ids(tokens: int) -> np.ndarray:
    """Random ids below 280, which are tokens (no padding) in every tiny vocabulary."""
    return (np.random.PCG64(11).random_raw(tokens) % 280).astype(np.int32)


def make_golden(name: str, folder: Path) -> None:
    """Compute and store one case."""
    case = CASES[name]
    path = make_tiny(case.model, folder / f"{case.model}.gguf")
    prompt = prompt_ids(case.tokens)
    positions = np.array(sorted({*range(0, case.tokens, 7), *EDGES, case.tokens - 1}), dtype=np.int32)
    positions = positions[positions < case.tokens]
    with float64_throughout():
        exact = logits(load(path, window=case.window == "file"), prompt)
    rounding = relative_error(logits(load(path, window=case.window == "file"), prompt), exact)
    assert rounding < 5e-5, f"{name}: float32 in transformers moves the logits by {rounding:.1e}"
    print(f"{name:17} spread {exact.std():.2f}, float32 inside moves it by {rounding:.1e}")
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        prompt=prompt,
        positions=positions,
        logits=exact[positions].astype(np.float32),
        sha256=file_sha256(path),
        versions=VERSIONS,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for case_name in CASES:
            make_golden(case_name, Path(temporary))
