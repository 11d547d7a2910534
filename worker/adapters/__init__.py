"""One file per architecture, and the registry that finds it by its GGUF name.

A new architecture is a file like `llama.py`, a line in `ADAPTERS` and a row in the tests.
"""

from typing import Protocol

from worker.adapters.gemma3 import Gemma3
from worker.adapters.gemma4 import Gemma4
from worker.adapters.gpt_oss import GptOss
from worker.adapters.granite import Granite
from worker.adapters.granitemoe import GraniteMoe
from worker.adapters.hparams import neutral_values, read_hparams
from worker.adapters.keys import ArchitectureKeys
from worker.adapters.llama import Llama
from worker.adapters.mistral3 import mistral3
from worker.adapters.mixtral import Mixtral
from worker.adapters.phi3 import Phi3
from worker.adapters.qwen2 import Qwen2
from worker.adapters.qwen3 import Qwen3
from worker.adapters.qwen3moe import Qwen3Moe
from worker.adapters.smollm3 import SmolLM3
from worker.adapters.weights import Weights, describe
from worker.backend import Upload
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.model import Hparams, Model, ModelOptions


class Adapter(Protocol):
    """Binds a file's weights to an architecture. Raises ModelLoadFailed if they do not match."""

    def __call__(self, hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> Model:
        """Return the bound model; `keys` reads the metadata keys of this architecture."""


def _llama(hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> Model:
    return (Mixtral if hp.expert_count else Llama)(hp, keys, w, options)


ADAPTERS: dict[str, Adapter] = {
    "gemma3": Gemma3,
    "gemma4": Gemma4,
    "gpt-oss": GptOss,
    "granite": Granite,
    "granitemoe": GraniteMoe,
    "llama": _llama,
    "mistral3": mistral3,
    "phi3": Phi3,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3moe": Qwen3Moe,
    "smollm3": SmolLM3,
}


OTHER_KINDS = {
    "adapter": "a LoRA adapter",
    "imatrix": "an importance matrix",
    "mmproj": "the vision or audio part of a model",
}
"""Values of `general.type` whose files are no models."""


def adapter_for(file: GgufFile) -> Adapter:
    """The adapter of a file's architecture. Raises ModelLoadFailed, which lists the known ones."""
    where, kind = str(file.path), file.metadata.get("general.type")
    if isinstance(kind, str) and kind in OTHER_KINDS:
        raise ModelLoadFailed(f"the file is {OTHER_KINDS[kind]} (general.type is {kind!r})", where, "a whole model")
    if not file.architecture:
        raise ModelLoadFailed("metadata key 'general.architecture' is missing", where, " or ".join(ADAPTERS))
    if file.architecture not in ADAPTERS:
        raise ModelLoadFailed(f"architecture {file.architecture!r} has no adapter", where, " or ".join(ADAPTERS))
    return ADAPTERS[file.architecture]


def bind(file: GgufFile, options: ModelOptions, upload: Upload = describe) -> tuple[Model, Weights]:
    """Bind the model of a file and return it with the tensors it uses.

    By default nothing is uploaded: this checks every key, name and shape. A key or tensor that may
    change the computation and that the adapter does not use is refused. Raises ModelLoadFailed.
    """
    adapter, keys, weights = adapter_for(file), ArchitectureKeys(file), Weights(file, upload)
    hp = read_hparams(file, keys)
    model = adapter(hp, keys, weights, options)
    keys.check_rest(neutral_values(hp))
    weights.unused()
    return model, weights
