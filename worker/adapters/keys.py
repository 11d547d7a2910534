"""Metadata keys of a file's architecture: read once, and refused if none reads them.

A key may change the computation, so `ArchitectureKeys.check_rest` refuses each key `ARCH.*` that no
adapter has read, except values that change nothing: `NEUTRAL`, `IRRELEVANT`, keys of vision and
audio parts, and zero, false and empty values, which mean that a feature is off. Keys outside
`ARCH.` never change the computation; `unknown_keys` lists those that are not known to be harmless.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile

T = TypeVar("T")
D = TypeVar("D")

_MAX_COUNT = 1 << 24
"""No model has that many layers, heads, tokens or features: a higher count is a broken file."""

_MAX_SCALE = 1 << 20
"""A factor, its inverse or its square beyond this could overflow f32 together with another."""

IRRELEVANT = frozenset(
    {
        "attention.layer_norm_epsilon",  # of models with another norm
        "pooling_type",  # of embeddings
        "rope.scaling.finetuned",  # describes the training
        "use_parallel_residual",  # true in files of converters of early 2024, whatever the architecture
        "vocab_size",  # the rows of the embedding decide
    }
)
"""Keys that change nothing, whatever their value."""

_OTHER_PARTS = ("vision.", "audio.")
"""Keys of parts that do not see text; `HARMLESS` of weights.py names their tensors."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.output_scale": (0.0, 1.0),
    "attention.value_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
}
"""Keys whose neutral values are not zero, and those values."""

_HARMLESS_KEYS = re.compile(
    r"general\.(type|architecture|name|author|version|organization|finetune|basename|description|quantized_by"
    r"|size_label|parameter_count|license|license\.(name|link)|url|doi|uuid|repo_url|source\..*|base_model\..*|dataset\..*|tags"
    r"|languages|datasets|file_type|quantization_version|alignment|sampling\..*)"
    r"|split\.(no|count|tensors\.count)|quantize\.imatrix\..*|tokenizer\.chat_templates?(\..*)?"
    r"|tokenizer\.(huggingface\.json|rwkv\.world)|tokenizer\.ggml\.(model|pre|tokens|token_type|token_type_count|scores"
    r"|merges|\w+_token_id|add_(bos|eos|sep)_token|add_space_prefix|remove_extra_whitespaces|precompiled_charsmap"
    r"|normalizer\..*|suppress_tokens)"
)


class ArchitectureKeys:
    """The metadata keys of the file's own architecture, named without its prefix: `block_count`.

    Every method raises ModelLoadFailed, which names the key, if it is missing, of another type or
    out of range.
    """

    def __init__(self, file: GgufFile) -> None:
        self.architecture = file.architecture
        self._file = file
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.name(key) in self._file.metadata

    def name(self, key: str) -> str:
        """The key as it is in the file."""
        return f"{self.architecture}.{key}"

    def get(self, key: str, kind: type[T], default: D) -> T | D:
        """Value of type `kind`, or `default` if the key is missing."""
        self._read.add(key)
        return self._file.get(self.name(key), kind, default)

    def value(self, key: str) -> Any:
        """Value of any type, or None if the key is missing."""
        self._read.add(key)
        return self._file.metadata.get(self.name(key))

    def count(self, key: str, default: int | None = None) -> int:
        """Integer from 1 to 2^24; required if there is no default."""
        self._read.add(key)
        name = self.name(key)
        value: int = self._file.require(name, int) if default is None else self._file.get(name, int, default)
        if not 0 < value <= _MAX_COUNT:
            raise self.error(key, f"is {value}", f"1 to {_MAX_COUNT}")
        return value

    def count_of_layers(self, key: str, layers: int, default: int | None = None) -> int:
        """Like `count`; the file may list the number once per layer, but not different numbers."""
        counts = self.counts_of_layers(key, layers, default)
        if len(set(counts)) > 1:
            shown = ", ".join(map(str, counts[:8]))
            raise self.error(key, f"is different in the layers: {shown}", f"equal numbers from 1 to {_MAX_COUNT}")
        return counts[0]

    def counts_of_layers(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """Like `count`, for each layer; the file may have one number for all."""
        value = self.value(key)
        if not isinstance(value, np.ndarray | list):
            return [self.count(key, default)] * layers
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != layers:
            raise self.error(key, f"is {shown_value(value)}", f"an integer, or {layers} integers")
        if value.min() < 1 or value.max() > _MAX_COUNT:
            shown = ", ".join(map(str, value[:8].tolist()))
            raise self.error(key, f"is {shown}", f"numbers from 1 to {_MAX_COUNT}")
        return [int(count) for count in value]

    def positive(self, key: str, default: float | None = None) -> float:
        """Finite number above 0; required if there is no default."""
        self._read.add(key)
        name = self.name(key)
        value: float = self._file.require(name, float) if default is None else self._file.get(name, float, default)
        if not 0 < value < math.inf:
            raise self.error(key, f"is {value}", "a positive number")
        return value

    def scale(self, key: str, default: float = 1.0) -> float:
        """Factor from 2^-20 to 2^20; zero and a missing key mean `default`, as in llama.cpp."""
        value = self.get(key, float, 0.0) or default
        if not 1 / _MAX_SCALE <= value <= _MAX_SCALE:
            raise self.error(key, f"is {value}", f"0, or a factor from {1 / _MAX_SCALE} to {_MAX_SCALE}")
        return value

    def width(self, key: str) -> int:
        """Integer from 0 to 2^24: the width of a part that a model may lack; 0 if missing."""
        value = self.get(key, int, 0)
        if not 0 <= value <= _MAX_COUNT:
            raise self.error(key, f"is {value}", f"0 to {_MAX_COUNT}")
        return value

    def sliding_window(self) -> int:
        """`attention.sliding_window`, in tokens; 0 if the file has none."""
        return self.width("attention.sliding_window")

    def unread(self, neutral: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        """Keys that nothing has read and that are not neutral, with their values.

        `neutral`: keys of this file whose neutral values depend on others, such as 1/sqrt(D).
        """
        prefix = f"{self.architecture}."
        for name, value in self._file.metadata.items():
            key = name.removeprefix(prefix)
            if key == name or key in self._read or key in IRRELEVANT or key.startswith(_OTHER_PARTS):
                continue
            values = neutral.get(key) or NEUTRAL.get(key, ())
            if not (any(_equal(value, each) for each in values) if values else _is_off(value)):
                yield key, value

    def check_rest(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise ModelLoadFailed for the first key of `unread`."""
        for key, value in self.unread(neutral):
            neutral_values = " or ".join(map(str, neutral.get(key) or NEUTRAL.get(key, ())))
            unknown = "no such key: its effect is unknown"
            expected = f"{neutral_values}, which changes nothing" if neutral_values else unknown
            raise self.error(key, f"is {shown_value(value)}", expected)

    def error(self, key: str, problem: str, expected: str) -> ModelLoadFailed:
        """The exception for a key's value: "KEY is 0; expected 1 to 16777216"."""
        return ModelLoadFailed(f"{self.name(key)} {problem}", str(self._file.path), expected)


def unknown_keys(file: GgufFile) -> tuple[str, ...]:
    """Keys outside the architecture's prefix that are not known to be harmless."""
    prefix = f"{file.architecture}."
    keys = (key for key in file.metadata if not key.startswith(prefix) and not _HARMLESS_KEYS.fullmatch(key))
    return tuple(key.encode(errors="replace").decode() for key in keys)


def ignored_keys(keys: Sequence[str]) -> str:
    """One sentence that names unknown keys, or an empty string without any."""
    return f"ignored unknown metadata keys: {', '.join(keys)}" if keys else ""


def _is_off(value: Any) -> bool:
    """Whether a value is zero, false, empty or an array of such values."""
    return not np.any(value) if isinstance(value, np.ndarray) else not value


def _equal(value: Any, neutral: Any) -> bool:
    """Whether a number or every number of an array is the neutral one, at f32 precision."""
    if isinstance(neutral, bool | str) or not isinstance(value, int | float | np.ndarray):
        return bool(type(value) is type(neutral) and value == neutral)
    return bool(np.allclose(value, neutral, rtol=1e-6, atol=0.0))


def shown_value(value: Any) -> str:
    """A value for a message: numbers and strings as they are, arrays by type and length."""
    if not isinstance(value, np.ndarray | list):
        return repr(value)[:60]
    kinds = {"b": "bools", "f": "floats", "i": "integers", "u": "integers"}
    return f"an array of {len(value)} {kinds[value.dtype.kind] if isinstance(value, np.ndarray) else 'values'}"
