"""What of a file no adapter understands, for `worker inspect`.

`diagnose` binds every registered adapter to the file in a trial that records what the adapter uses
and lacks instead of raising. The closest architecture is the one whose trial leaves the least over.
Next: `features.py`, which describes what is left.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.adapters import ADAPTERS, OTHER_KINDS, Adapter
from worker.adapters.features import UNKNOWN, Feature, describe_part
from worker.adapters.hparams import neutral_values
from worker.adapters.keys import ArchitectureKeys, shown_value
from worker.adapters.weights import HARMLESS, Weights, describe
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile, TensorInfo
from worker.model import Hparams, Model, ModelOptions
from worker.quants import F32, QUANT_TYPES
from worker.rope import RopeScaling

_MAX_LAYERS, _MAX_WIDTH = 1024, 1 << 16
"""Bounds of a trial, whatever the file says."""
_TRIAL_CONTEXT = 16
_MAX_NAME, _SHOWN = 100, 8
_LAYER = re.compile(r"blk\.(\d+)\.")
_ROPE_KEYS = (
    *("rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)
"""Keys that all adapters apply."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the file that the closest adapter does not use."""

    what: str
    """In plain terms; "purpose unknown" for names that no catalogue has."""
    needs: str
    """What an adapter needs for it."""
    tensors: tuple[str, ...]
    """Names with `blk.*.` for all layers, and the number of layers."""
    keys: tuple[str, ...]
    """Metadata keys with their values."""
    used_by: tuple[str, ...]
    """Known architectures that use a tensor or key of this name, maybe with another meaning."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a file has no adapter, or does not match its own."""

    architecture: str
    known: tuple[str, ...]
    closest: str
    """The file's own architecture if it is known."""
    parts: tuple[Part, ...]
    missing_tensors: tuple[str, ...]
    """Tensors that the closest architecture needs and the file lacks or has in another shape."""
    missing_keys: tuple[str, ...]
    """Metadata keys that the closest architecture needs and the file lacks."""


def diagnose(file: GgufFile) -> Diagnosis | None:
    """What the closest adapter does not understand.

    None if that is nothing, if the file is no model, and if its own adapter refuses a value: the
    error names it.
    """
    kind = file.metadata.get("general.type")
    if not file.architecture or not file.tensors or (isinstance(kind, str) and kind in OTHER_KINDS):
        return None
    trials = {name: _trials(file, name, adapter) for name, adapter in ADAPTERS.items()}
    own = file.architecture if file.architecture in trials else min(trials, key=lambda name: _distance(trials[name][0]))
    closest = trials[own][0]
    if own == file.architecture and not closest.complete:
        return None
    parts = _parts(file, closest, trials)
    missing = tuple(_templates(closest.weights.missing))
    missing_keys = tuple(closest.keys.missing)
    if own == file.architecture and not (parts or missing or missing_keys):
        return None
    return Diagnosis(file.architecture, tuple(trials), own, parts, missing, missing_keys)


class _TrialKeys(ArchitectureKeys):
    """Keys that have a default where the file has none, or an unusable one."""

    def __init__(self, file: GgufFile) -> None:
        super().__init__(file)
        self.missing: list[str] = []
        """Required keys that the file lacks."""

    def get(self, key: str, kind: Any, default: Any) -> Any:
        try:
            return super().get(key, kind, default)
        except ModelLoadFailed:
            return default

    def count(self, key: str, default: int | None = None) -> int:
        """The key's number, or the largest of an array, within the bounds of a trial."""
        value = self.value(key)
        if value is None and default is None:
            self.missing.append(self.name(key))
        numbers = value[:_MAX_LAYERS].tolist() if isinstance(value, np.ndarray) else [value]
        counts = [each for each in numbers if isinstance(each, int) and 0 < each <= _MAX_WIDTH]
        return max(counts, default=min(default or 1, _MAX_WIDTH))

    def counts_of_layers(self, key: str, layers: int, default: int | None = None) -> list[int]:
        value = self.value(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value) >= layers:
            return [min(max(1, int(count)), _MAX_WIDTH) for count in value[:layers]]
        return [self.count(key, default)] * layers

    def positive(self, key: str, default: float | None = None) -> float:
        if default is None and key not in self:
            self.missing.append(self.name(key))
        try:
            return super().positive(key, 1.0 if default is None else default)
        except ModelLoadFailed:
            return default or 1.0

    def uses(self, key: str) -> bool:
        """Whether the adapter has read the key."""
        return key in self._read

    def forget(self, key: str) -> None:
        """Treat the key as not read: the adapter has read it and not applied it."""
        self._read.discard(key)


class _TrialWeights(Weights):
    """Weights that record a missing tensor, or one of another shape, and go on."""

    def __init__(self, file: GgufFile) -> None:
        super().__init__(file, describe)
        self.missing: list[str] = []

    def _claim(self, name: str, *shape: int) -> TensorInfo:
        info = self._file.tensors.get(name)
        if info is not None:
            self._claimed[name] = (info,)
        if info is None or info.shape != shape:
            self.missing.append(name)
        return TensorInfo(name, shape, F32, 0, 0)

    def host_vector(self, name: str, n: int) -> npt.NDArray[np.float64]:
        self.vector(name, n)
        return np.ones(n)

    def uses(self, name: str) -> bool:
        """Whether the adapter has claimed the tensor, or left it out."""
        return name in self._claimed or name in self._left_out


@dataclass(frozen=True, slots=True)
class _Trial:
    """What one adapter used of the file."""

    keys: _TrialKeys
    weights: _TrialWeights
    unclaimed: tuple[str, ...]
    """Tensors that the adapter has not claimed."""
    unread: tuple[tuple[str, Any], ...]
    """Keys that it has not read, and their values."""
    complete: bool
    """Whether the adapter was bound, and did not refuse the file before."""

    def uses(self, tensors: Iterable[str], keys: Iterable[str]) -> bool:
        """Whether the adapter uses one of these tensors or keys."""
        return any(map(self.weights.uses, tensors)) or any(map(self.keys.uses, keys))


def _distance(trial: _Trial) -> tuple[bool, int, int, int]:
    """Rank of a trial: complete ones first, then by missing keys, unclaimed tensors, the rest."""
    missing_names = len(_templates(trial.weights.missing))
    return not trial.complete, len(trial.keys.missing), len(trial.unclaimed), len(trial.unread) + missing_names


def _trials(file: GgufFile, name: str, adapter: Adapter) -> list[_Trial]:
    """Trials with the file's experts, without any and with some, the best one first.

    An adapter of another kind refuses one of them and uses more in another.
    """
    return sorted((_trial(file, name, adapter, experts) for experts in (None, (0, 0), (2, 1))), key=_distance)


def _trial(file: GgufFile, name: str, adapter: Adapter, experts: tuple[int, int] | None) -> _Trial:
    keys, weights = _TrialKeys(file), _TrialWeights(file)
    hp = _hparams(file, keys, name, experts)
    complete = False
    with suppress(ModelLoadFailed):  # of an adapter that refuses the file; what it has claimed counts
        model = adapter(hp, keys, weights, ModelOptions(_TRIAL_CONTEXT))
        complete = True
        _forget_unused_window(model, keys, hp)
    unclaimed = (tensor for tensor in file.tensors if not weights.uses(tensor) and not HARMLESS.fullmatch(tensor))
    return _Trial(keys, weights, tuple(unclaimed), tuple(keys.unread(neutral_values(hp))), complete)


def _forget_unused_window(model: Model, keys: _TrialKeys, hp: Hparams) -> None:
    """Count a window below the file's context as left over if the adapter applies none."""
    if hp.architecture != "phi3" and not any(layer.attention.window for layer in model.layers):
        window = keys.get("attention.sliding_window", int, 0)
        if 0 < window < hp.context_length:
            keys.forget("attention.sliding_window")


def _hparams(file: GgufFile, keys: _TrialKeys, name: str, experts: tuple[int, int] | None) -> Hparams:
    """Hyper-parameters of a trial: the file's where they are usable, and small numbers elsewhere.

    `experts`: their number and how many are used; None is the file's.
    RoPE's base and factors decide no name and no shape, so that a trial takes the default ones.
    """
    numbers = {match[1] for tensor in file.tensors if (match := _LAYER.match(tensor))}
    heads, width = keys.count("attention.head_count"), keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", max(1, width // heads))
    in_file = keys.get("expert_count", int, 0), keys.get("expert_used_count", int, 0)
    count, used = in_file if experts is None and 0 < in_file[1] <= in_file[0] else experts or (0, 0)
    table = file.tensors.get("token_embd.weight")
    for key in _ROPE_KEYS:
        keys.value(key)
    kind = "longrope" if keys.get("rope.scaling.type", str, "none") == "longrope" else "none"
    hp = Hparams(
        architecture=name,
        block_count=max(1, min(keys.count("block_count"), len(numbers), _MAX_LAYERS)),
        embedding_length=width,
        feed_forward_length=keys.count("feed_forward_length"),
        head_count=heads,
        head_count_kv=keys.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=table.shape[0] if table else 1,
        context_length=keys.count("context_length"),
        rms_epsilon=keys.positive("attention.layer_norm_rms_epsilon"),
        rope_freq_base=10000.0,
        rope_dims=max(2, min(head_dim, keys.count("rope.dimension_count", head_dim)) // 2 * 2),
        rope_scaling=RopeScaling(kind, original_context=_TRIAL_CONTEXT),
        expert_count=count,
        expert_used_count=used,
        expert_feed_forward_length=keys.count("expert_feed_forward_length")
        if "expert_feed_forward_length" in keys
        else 0,
        # Not with `keys`: it is left over if the adapter does not read it.
        layer_input_length=max(0, min(_TrialKeys(file).get("embedding_length_per_layer_input", int, 0), _MAX_WIDTH)),
    )
    _forget_unusable(keys, hp)
    return hp


def _forget_unusable(keys: _TrialKeys, hp: Hparams) -> None:
    """Count shared keys as left over whose values no adapter can apply."""
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        value = keys.value(key)
        if isinstance(value, np.ndarray) and len(np.unique(value[:_MAX_LAYERS])) > 1:
            keys.forget(key)
    if keys.get("attention.value_length", int, hp.head_dim) != hp.head_dim:
        keys.forget("attention.value_length")
    if keys.get("rope.scaling.type", str, "none") not in ("none", "linear", "yarn", "longrope"):
        keys.forget("rope.scaling.type")


def _parts(file: GgufFile, closest: _Trial, trials: Mapping[str, list[_Trial]]) -> tuple[Part, ...]:
    """What is left over, by feature: those with a description first, in the file's order."""
    tensors: dict[Feature, list[str]] = defaultdict(list)
    keys: dict[Feature, list[str]] = defaultdict(list)
    for tensor in closest.unclaimed:
        tensors[describe_part(tensor)].append(tensor)
    for key, _ in closest.unread:
        keys[describe_part(key, key=True)].append(key)
    values = dict(closest.unread)
    parts = [
        Part(
            feature.what,
            feature.needs,
            tuple(_templates(tensors[feature])),
            tuple(f"{_text(closest.keys.name(key))} = {_value(values[key])}" for key in keys[feature]),
            tuple(name for name, each in trials.items() if any(t.uses(tensors[feature], keys[feature]) for t in each)),
        )
        for feature in dict.fromkeys((*tensors, *keys))
    ]
    return (*sorted(parts, key=lambda part: part.what == UNKNOWN), *_unreadable(file))


def _unreadable(file: GgufFile) -> Iterator[Part]:
    """A part for each tensor type that no device reads."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, info in file.tensors.items():
        if info.kind not in QUANT_TYPES:
            kinds[info.kind.name].append(name)
    for kind, names in kinds.items():
        what, needs = f"tensors of type {kind}", "a block format in worker/quants.py and its kernels"
        yield Part(what, needs, tuple(_templates(names)), (), ())


def _templates(names: Iterable[str]) -> list[str]:
    """Names with `blk.*.` for the layers, each with their number if there are several."""
    counts = Counter(_LAYER.sub("blk.*.", _text(name)) for name in names)
    layers = {
        name: f" ({count} layer{'s' * (count > 1)})" if "blk.*." in name else "" for name, count in counts.items()
    }
    return [name + layers[name] for name in counts]


def _text(name: str) -> str:
    """A name as valid text of bounded length."""
    plain = name.encode(errors="replace").decode()
    return plain if len(plain) <= _MAX_NAME else f"{plain[:_MAX_NAME]}…"


def _value(value: Any) -> str:
    """A metadata value; the first values of an array of numbers."""
    if isinstance(value, np.ndarray) and value.size:
        first = ", ".join(map(str, value[:_SHOWN].tolist()))
        return f"[{first}]" if value.size <= _SHOWN else f"[{first}, …] ({value.size} values)"
    return f"{value:.6g}" if isinstance(value, float) else _text(shown_value(value))
