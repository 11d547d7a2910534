"""One short file an architecture, and the registry that finds it by its GGUF name.

A new architecture is a file like `llama.py`, a line here and a row in the tests.
"""

from __future__ import annotations

from typing import Protocol

from worker.adapters.gpt_oss import GptOss
from worker.adapters.llama import Llama
from worker.adapters.phi3 import Phi3
from worker.adapters.qwen2 import Qwen2
from worker.adapters.weights import Weights
from worker.errors import ModelLoadFailed
from worker.model import Hparams, Model, ModelOptions


class Adapter(Protocol):
    """Binds a file's weights to an architecture. Raises ModelLoadFailed where file and architecture disagree."""

    def __call__(self, hp: Hparams, w: Weights, options: ModelOptions) -> Model:
        """The model, bound."""
        ...


ADAPTERS: dict[str, Adapter] = {"gpt-oss": GptOss, "llama": Llama, "phi3": Phi3, "qwen2": Qwen2}


def adapter_for(architecture: str, where: str) -> Adapter:
    """The adapter of a GGUF architecture. Raises ModelLoadFailed naming those that exist."""
    if architecture not in ADAPTERS:
        raise ModelLoadFailed(f"architecture {architecture!r} has no adapter", where, " or ".join(ADAPTERS))
    return ADAPTERS[architecture]
