"""One file per architecture, and the registry that finds it by its GGUF name.

A new architecture is a file like `llama.py`, a line in `ADAPTERS` and a row in the tests.
"""

from typing import Protocol

from worker.adapters.gpt_oss import GptOss
from worker.adapters.hparams import ArchitectureKeys, read_hparams
from worker.adapters.llama import Llama
from worker.adapters.phi3 import Phi3
from worker.adapters.qwen2 import Qwen2
from worker.adapters.weights import Weights, describe
from worker.backend import Upload
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.model import Hparams, Model, ModelOptions


class Adapter(Protocol):
    """Binds a file's weights to an architecture. Raises ModelLoadFailed if they do not match."""

    def __call__(self, hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> Model:
        """Return the bound model; `keys` reads the metadata keys of this architecture."""


ADAPTERS: dict[str, Adapter] = {"gpt-oss": GptOss, "llama": Llama, "phi3": Phi3, "qwen2": Qwen2}


def adapter_for(architecture: str, where: str) -> Adapter:
    """The adapter of a GGUF architecture. Raises ModelLoadFailed, which lists the known ones."""
    if architecture not in ADAPTERS:
        raise ModelLoadFailed(f"architecture {architecture!r} has no adapter", where, " or ".join(ADAPTERS))
    return ADAPTERS[architecture]


def bind(file: GgufFile, options: ModelOptions, upload: Upload = describe) -> tuple[Model, Weights]:
    """Bind the model of a file and return it with the tensors it uses.

    By default nothing is uploaded: this checks every key, name and shape. Raises ModelLoadFailed.
    """
    weights = Weights(file, upload)
    adapter = adapter_for(file.architecture, str(file.path))
    return adapter(read_hparams(file), ArchitectureKeys(file), weights, options), weights
