"""Tiny random models of every architecture as GGUF files, the same bytes from the same seed on every machine.

Each has what is special about its architecture at a size that NumPy runs in a moment: names, shapes and metadata are
those of llama.cpp's converter. `TINY` lists them, `make_tiny` writes one; a golden file's SHA-256 notices a change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from tests.tiny_vocabulary import VOCABULARIES, Vocabulary, add_vocabulary
from tests.tiny_weights import RandomWeights

Value = int | float | str | list[int] | list[bool]
# The k-quants first: only rows that are a multiple of 256 can take them, the others fit nearly everywhere.
K_QUANTS = ("Q4_K", "Q6_K", "Q5_K", "Q3_K", "Q2_K")
MIXED = (*K_QUANTS, "Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q5_1", "MXFP4", "F16", "BF16", "F32")


@dataclass(frozen=True)
class TinyShape:
    """One model's shape, and the metadata that only its architecture has (keys without the `ARCH.` before them)."""

    arch: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    metadata: Mapping[str, Value]
    context: int = 512
    tied: bool = False
    experts: int = 0
    expert_ffn: int = 0
    """Width of an expert's FFN where it is not `ffn`."""
    beside_dense: bool = False
    """The experts are beside a dense FFN of width `ffn`, each branch with norms of its own."""
    shared_ffn: int = 0
    """Width of a dense FFN beside the experts."""
    rope_tensors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    """Projections with a bias that most files of the architecture lack, such as `ffn_up`."""
    windowed: tuple[bool, ...] = ()
    """Which layers have the heads of `window_heads` instead of `kv_heads` of `head_dim`."""
    window_heads: tuple[int, int] = (0, 0)
    """Number of KV heads and head width."""
    own_values: bool = False
    """Layers without a window have a projection of v, where others take k."""
    shared_kv: int = 0
    """Last layers without keys and values of their own, whose FFN is twice as wide."""
    layer_input: int = 0
    """Elements of a token's input to each layer beside the residual."""
    post_norm: float = 0.0
    """Mean of the norms before an addition, if not that of `_after`."""
    big_vocabulary: Vocabulary | None = None
    """The vocabulary of a full-size file; a tiny one has that of its architecture."""

    def of_layer(self, layer: int) -> TinyShape:
        """The shape with the heads and the FFN of one layer; without KV heads if it has no keys and values."""
        shape = self
        if any(self.windowed[layer : layer + 1]):
            shape = replace(self, kv_heads=self.window_heads[0], head_dim=self.window_heads[1])
        if layer >= self.layers - self.shared_kv:
            shape = replace(shape, kv_heads=0, ffn=2 * self.ffn)
        return shape

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens, padding included."""
        return self.big_vocabulary or VOCABULARIES[self.arch]

    @property
    def vocab(self) -> int:
        """Rows of the vocabulary, padding included."""
        return self.vocabulary.rows


@dataclass(frozen=True)
class Tensor:
    """A tensor's name, its shape outermost first, and the values' mean and spread."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    @property
    def quantized(self) -> bool:
        """Biases, norms, sinks and the router stay F32 in every published file."""
        return len(self.shape) > 1 and not self.name.endswith((".bias", "ffn_gate_inp.weight"))


def llama3_divisors(base: float, dims: int, factor: float, low: float, high: float, original: int) -> tuple[float, ...]:
    """What Llama 3.1 divides rotary frequencies by: 1 for short wavelengths, `factor` for long ones, a ramp between."""
    divisors = []
    for exponent in range(0, dims, 2):
        wavelength = 2 * math.pi * base ** (exponent / dims)
        kept = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - kept) / factor + kept))
    return tuple(divisors)


_QWEN2 = TinyShape(
    arch="qwen2",
    layers=2,
    width=384,
    heads=6,
    kv_heads=2,
    head_dim=64,
    ffn=256,
    metadata={"rope.freq_base": 1e6, "attention.layer_norm_rms_epsilon": 1e-6},
)
_PHI3 = TinyShape(
    arch="phi3",
    layers=2,
    width=384,
    heads=4,
    kv_heads=2,
    head_dim=96,
    ffn=256,
    metadata={
        "rope.freq_base": 1e4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 96,
        "rope.scaling.original_context_length": 512,
        "attention.sliding_window": 47,
    },
)
_GPT_OSS = TinyShape(
    arch="gpt-oss",
    layers=3,
    width=192,
    heads=4,
    kv_heads=2,
    head_dim=64,
    ffn=128,
    experts=8,
    context=4096,
    metadata={
        "rope.freq_base": 150000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.sliding_window": 32,
        "expert_count": 8,
        "expert_used_count": 4,
        "expert_feed_forward_length": 128,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 128,
    },
)
_QWEN3 = TinyShape(
    arch="qwen3",
    layers=2,
    width=256,
    heads=4,
    kv_heads=2,
    head_dim=128,
    ffn=512,
    metadata={
        "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 128,
        "attention.value_length": 128,
    },
)
_GEMMA3 = TinyShape(
    arch="gemma3",
    layers=3,
    width=256,
    heads=4,
    kv_heads=2,
    head_dim=256,
    ffn=512,
    tied=True,
    metadata={
        "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": 2,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    },
)
_GEMMA4 = TinyShape(
    arch="gemma4",
    layers=4,
    width=256,
    heads=4,
    kv_heads=1,
    head_dim=512,
    ffn=512,
    tied=True,
    windowed=(True, False, True, False),
    window_heads=(2, 256),
    metadata={
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.dimension_count": 512,
        "rope.dimension_count_swa": 256,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 512,
        "attention.value_length": 512,
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "attention.head_count_kv": [2, 1, 2, 1],
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": [True, False, True, False],
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": 8.0,
    },
    rope_tensors={"rope_freqs.weight": (1.0,) * 64 + (1e30,) * 192},
)
_EXPERTS = {"expert_count": 8, "expert_used_count": 3}
# All four differ from 1 and D^-0.5 as the published ones do, by less, so that each shows in the logits.
_GRANITE_SCALES = {"embedding_scale": 3.0, "attention.scale": 0.05, "residual_scale": 0.4, "logit_scale": 2.0}
_LLAMA = TinyShape(
    arch="llama",
    layers=2,
    width=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    ffn=512,
    metadata={
        "rope.freq_base": 1e5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 64,
        "vocab_size": 320,
    },
)
_GRANITE_MOE = replace(
    _LLAMA,
    arch="granitemoe",
    ffn=256,
    experts=8,
    tied=True,
    metadata={**_LLAMA.metadata, **_GRANITE_SCALES, **_EXPERTS},
)
# Heads of 96 elements are wider than d/H, as in Mistral Nemo and Ministral.
_MISTRAL = replace(
    _LLAMA,
    head_dim=96,
    metadata={
        **_LLAMA.metadata,
        "rope.freq_base": 1e6,
        "rope.dimension_count": 96,
        "attention.key_length": 96,
        "attention.value_length": 96,
    },
)
_MISTRAL_YARN: Mapping[str, Value] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 16.0,
    "rope.scaling.original_context_length": 24,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}
_MISTRAL3 = replace(
    _MISTRAL,
    arch="mistral3",
    metadata={
        **_MISTRAL.metadata,
        **_MISTRAL_YARN,
        "rope.scaling.yarn_log_multiplier": 1.0,
        "attention.temperature_scale": 0.5,
    },
)

TINY: dict[str, TinyShape] = {
    "qwen2": replace(_QWEN2, tied=True),
    "qwen2-untied": replace(_QWEN2, kv_heads=3),
    "phi3": _PHI3,
    "phi3-longrope": replace(
        _PHI3,
        metadata={
            **_PHI3.metadata,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(512 / 128) / math.log(128)),
            "attention.sliding_window": 262144,
        },
        rope_tensors={
            "rope_factors_long.weight": tuple(1.0 + 0.125 * pair for pair in range(48)),
            "rope_factors_short.weight": tuple(1.0 + 0.0078125 * pair for pair in range(48)),
        },
    ),
    "gpt-oss": _GPT_OSS,
    # The ramp's bounds both fall between two pairs, from betas that only the file tells.
    "gpt-oss-yarn": replace(
        _GPT_OSS,
        context=8192,
        metadata={
            **_GPT_OSS.metadata,
            "rope.scaling.original_context_length": 256,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
        },
    ),
    "llama": replace(_LLAMA, tied=True),
    "mistral": replace(_MISTRAL, metadata={**_MISTRAL.metadata, **_MISTRAL_YARN}),
    "mistral3": _MISTRAL3,
    "mistral3-experts": replace(
        _MISTRAL3, head_dim=64, ffn=256, experts=8, metadata={**_LLAMA.metadata, **_MISTRAL_YARN, **_EXPERTS}
    ),
    "mixtral": replace(_LLAMA, ffn=256, experts=8, metadata={**_LLAMA.metadata, **_EXPERTS}),
    "qwen3": replace(_QWEN3, tied=True),
    "qwen3moe": replace(
        _QWEN3,
        arch="qwen3moe",
        experts=8,
        expert_ffn=256,
        metadata={**_QWEN3.metadata, **_EXPERTS, "expert_feed_forward_length": 256},
    ),
    "granite": replace(_LLAMA, arch="granite", tied=True, metadata={**_LLAMA.metadata, **_GRANITE_SCALES}),
    "granitemoe": _GRANITE_MOE,
    "granitemoe-shared": replace(
        _GRANITE_MOE,
        shared_ffn=512,
        metadata={**_GRANITE_MOE.metadata, "expert_shared_feed_forward_length": 512},
    ),
    "smollm3": replace(_LLAMA, arch="smollm3", layers=5, tied=True),
    "gemma3": _GEMMA3,
    # The shape of 27B, whose number of layers decides the query scale; the period is not in the file.
    "gemma3-27b": replace(
        _GEMMA3,
        layers=62,
        width=96,
        heads=2,
        kv_heads=1,
        head_dim=128,
        ffn=64,
        metadata={
            **{key: value for key, value in _GEMMA3.metadata.items() if "pattern" not in key},
            "attention.key_length": 128,
            "attention.value_length": 128,
        },
    ),
    "gemma4": _GEMMA4,
    # The last layer of each kind before the shared ones is one of the two before these, as llama.cpp has it.
    "gemma4-shared": replace(
        _GEMMA4,
        layers=6,
        windowed=(True, False) * 3,
        window_heads=(1, 256),
        own_values=True,
        shared_kv=2,
        layer_input=64,
        metadata={
            **_GEMMA4.metadata,
            "attention.head_count_kv": 1,
            "attention.sliding_window_pattern": [True, False] * 3,
            "attention.shared_kv_layers": 2,
            "embedding_length_per_layer_input": 64,
            "feed_forward_length": [512, 512, 512, 512, 1024, 1024],
        },
    ),
    # 160 columns are no multiple of 256, as 26B-A4B's 704.
    "gemma4-experts": replace(
        _GEMMA4,
        experts=8,
        expert_ffn=160,
        beside_dense=True,
        metadata={**_GEMMA4.metadata, **_EXPERTS, "expert_feed_forward_length": 160},
    ),
    "llama-biased": replace(
        _LLAMA, biases=("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ),
    "qwen2-biased": replace(_QWEN2, biases=("output",)),
    "llama3-rope": replace(
        _LLAMA,
        metadata={**_LLAMA.metadata, "rope.freq_base": 5e5},
        rope_tensors={"rope_freqs.weight": llama3_divisors(5e5, 64, factor=8.0, low=1.0, high=4.0, original=128)},
    ),
}


def make_tiny(name: str, path: Path, *, seed: int = 0, quant: str | Mapping[str, str] = "mixed") -> Path:
    """Write the model `TINY[name]` as a GGUF v3 file and return its path.

    `quant` is "mixed" (as many types as the rows' lengths allow, MXFP4 experts), one GGUF type for every matrix that
    can take it (Q8_0 elsewhere), or types by tensor name with F32 for the rest.
    """
    order = list(MIXED)
    file_type = gguf.LlamaFileType.ALL_F32 if quant == "F32" else gguf.LlamaFileType.MOSTLY_Q8_0
    return write_model(path, TINY[name], f"tiny {name}", file_type, lambda each: _kind(each, quant, order), seed)


def write_model(
    path: Path,
    shape: TinyShape,
    name: str,
    file_type: gguf.LlamaFileType,
    kind_of: Callable[[Tensor], Type],
    seed: int,
) -> Path:
    """Write a model as a GGUF v3 file, one tensor at a time, and return its path; `kind_of` gives a matrix's type."""
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    _add_hyper_parameters(writer, shape)
    add_vocabulary(writer, shape.vocabulary)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor_name, factors in shape.rope_tensors.items():
        writer.add_tensor_info(tensor_name, (len(factors),), np.dtype(np.float32), 4 * len(factors))
    kinds = {tensor: kind_of(tensor) if tensor.quantized else Type.F32 for tensor in tensors_of(shape)}
    for tensor, kind in kinds.items():
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(tensor.shape) // elements * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for factors in shape.rope_tensors.values():
        writer.write_tensor_data(np.array(factors, dtype=np.float32))
    for tensor, kind in kinds.items():
        writer.write_tensor_data(_data(tensor, kind, RandomWeights(seed, tensor.name)))
    writer.close()
    return path


def _data(tensor: Tensor, kind: Type, weights: RandomWeights) -> np.ndarray:
    if tensor.quantized:
        return weights.matrix(kind, tensor.shape, tensor.std)
    return weights.normal(tensor.shape, tensor.std, tensor.mean)


def _add_hyper_parameters(writer: gguf.GGUFWriter, shape: TinyShape) -> None:
    metadata: dict[str, Value] = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.width,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        **shape.metadata,
    }
    for key, value in metadata.items():
        full = f"{shape.arch}.{key}"
        match value:
            case int():
                writer.add_uint32(full, value)
            case float():
                writer.add_float32(full, value)
            case str():
                writer.add_string(full, value)
            case list():
                writer.add_array(full, value)


def _kind(tensor: Tensor, quant: str | Mapping[str, str], order: list[str]) -> Type:
    """The tensor's type; for "mixed" the first of `order` that its rows can take, which then goes to the end."""
    columns = tensor.shape[-1]
    if not isinstance(quant, str):
        return Type[quant.get(tensor.name, "F32")]
    if quant != "mixed":
        return Type[quant] if columns % gguf.GGML_QUANT_SIZES[Type[quant]][0] == 0 else Type.Q8_0
    if "_exps" in tensor.name and quant == "mixed" and columns % 256:
        return Type.MXFP4
    name = next(name for name in order if columns % gguf.GGML_QUANT_SIZES[Type[name]][0] == 0)
    order.remove(name)
    order.append(name)
    return Type[name]


def tensors_of(shape: TinyShape) -> Iterator[Tensor]:
    """Every tensor in a file's order. The spreads make attention sharp and logits wide, so that mistakes show."""
    d, V = shape.width, shape.vocab
    yield Tensor("token_embd.weight", (V, d), 2 / math.sqrt(d))
    if P := shape.layer_input:
        yield Tensor("per_layer_token_embd.weight", (V, shape.layers * P), 1 / math.sqrt(P))
        yield Tensor("per_layer_model_proj.weight", (shape.layers * P, d), 1.3 / math.sqrt(d))
        yield Tensor("per_layer_proj_norm.weight", (P,), 0.25, mean=1.0)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        yield Tensor(block + "attn_norm.weight", (d,), 0.25, mean=1.0)
        yield from _attention(shape.of_layer(layer), block)
        if shape.arch in ("gemma3", "gemma4"):
            yield _after(shape, block + "post_attention_norm")
        norm = "post_attention_norm" if shape.arch == "gpt-oss" else "ffn_norm"
        yield Tensor(f"{block}{norm}.weight", (d,), 0.25, mean=1.0)
        if shape.beside_dense or not shape.experts:
            yield from _feed_forward(shape.of_layer(layer), block)
        if shape.beside_dense:
            yield from _experts_beside(shape, block)
        elif shape.experts:
            yield from _experts(shape, block)
        if shape.arch in ("gemma3", "gemma4"):
            yield _after(shape, block + "post_ffw_norm")
        if shape.arch == "gemma4":
            yield Tensor(block + "layer_output_scale.weight", (1,), 0.1, mean=0.75)
        if shape.layer_input:
            yield from _own_input(shape, block)
    yield Tensor("output_norm.weight", (d,), 0.25, mean=1.0)
    if not shape.tied:
        yield Tensor("output.weight", (V, d), 2 / math.sqrt(d))
    yield from _bias(shape, "", "output", V)


def _own_input(shape: TinyShape, block: str) -> Iterator[Tensor]:
    """The gate, the projection and the norm of a layer's own input."""
    d, P = shape.width, shape.layer_input
    yield Tensor(block + "inp_gate.weight", (P, d), 1.3 / math.sqrt(d))
    yield Tensor(block + "proj.weight", (d, P), 1.3 / math.sqrt(P))
    yield _after(shape, block + "post_norm")


def _after(shape: TinyShape, norm: str) -> Tensor:
    """A norm before an addition: the more layers, the less each adds, so that rounding does not grow."""
    mean = shape.post_norm or min(1.0, 4 / shape.layers)
    return Tensor(f"{norm}.weight", (shape.width,), mean / 4, mean=mean)


def _bias(shape: TinyShape, block: str, part: str, rows: int) -> Iterator[Tensor]:
    """The bias of a projection, if the shape lists it."""
    if part in shape.biases:
        yield Tensor(f"{block}{part}.bias", (rows,), 0.5)


def _attention(shape: TinyShape, block: str) -> Iterator[Tensor]:
    d, q, kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    biased = shape.arch in ("qwen2", "gpt-oss")
    if shape.arch == "phi3":
        yield Tensor(block + "attn_qkv.weight", (q + 2 * kv, d), 1.3 / math.sqrt(d))
    else:
        parts = {"attn_q": q, "attn_k": kv, "attn_v": kv} if kv else {"attn_q": q}
        if shape.windowed and shape.head_dim != shape.window_heads[1] and not shape.own_values:
            del parts["attn_v"]  # v is k
        for part, rows in parts.items():
            yield Tensor(f"{block}{part}.weight", (rows, d), 1.3 / math.sqrt(d))
            if biased:
                yield Tensor(f"{block}{part}.bias", (rows,), 0.5)
            yield from _bias(shape, block, part, rows)
    if shape.arch.startswith(("qwen3", "gemma")):
        scale = shape.head_dim**-0.25 if shape.arch == "gemma4" else 1.0  # its scores are not divided by the root
        for part in ("attn_q_norm", "attn_k_norm")[: 2 if kv else 1]:
            yield Tensor(f"{block}{part}.weight", (shape.head_dim,), 0.25 * scale, mean=1.5 * scale)
    yield Tensor(block + "attn_output.weight", (d, q), 1.5 / math.sqrt(q))
    yield from _bias(shape, block, "attn_output", d)
    if shape.arch == "gpt-oss":
        yield Tensor(block + "attn_output.bias", (d,), 0.25)
        yield Tensor(block + "attn_sinks.weight", (shape.heads,), 1.5, mean=3.0)


def _feed_forward(shape: TinyShape, block: str) -> Iterator[Tensor]:
    d, f = shape.width, shape.ffn
    if shape.arch == "phi3":
        yield Tensor(block + "ffn_up.weight", (2 * f, d), 1.3 / math.sqrt(d))
    else:
        for part in ("ffn_gate", "ffn_up"):
            yield Tensor(f"{block}{part}.weight", (f, d), 1.3 / math.sqrt(d))
            yield from _bias(shape, block, part, f)
    yield Tensor(block + "ffn_down.weight", (d, f), 1.3 / math.sqrt(f))
    yield from _bias(shape, block, "ffn_down", d)


def _experts_beside(shape: TinyShape, block: str) -> Iterator[Tensor]:
    """Experts beside a dense FFN, whose router has a norm; gate above up in one tensor."""
    d, f, E = shape.width, shape.expert_ffn, shape.experts
    for norm in ("post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2"):
        yield Tensor(f"{block}{norm}.weight", (d,), 0.25, mean=1.0)
    yield Tensor(block + "ffn_gate_inp.weight", (E, d), 2 / math.sqrt(d))
    yield Tensor(block + "ffn_gate_inp.scale", (d,), 0.25 * math.sqrt(d), mean=math.sqrt(d))
    yield Tensor(block + "ffn_gate_up_exps.weight", (E, 2 * f, d), 1.3 / math.sqrt(d))
    yield Tensor(block + "ffn_down_exps.weight", (E, d, f), 1.3 / math.sqrt(f))
    yield Tensor(block + "ffn_down_exps.scale", (E,), 0.25, mean=1.0)


def _experts(shape: TinyShape, block: str) -> Iterator[Tensor]:
    """A mixture; gate and up of gpt-oss's reach beyond 7, so that their clamp is in use."""
    d, f, E = shape.width, shape.expert_ffn or shape.ffn, shape.experts
    biased, gains = (True, (3, 3, 0.25)) if shape.arch == "gpt-oss" else (False, (1.3, 1.3, 1.3))
    yield Tensor(block + "ffn_gate_inp.weight", (E, d), 2 / math.sqrt(d))
    if biased:
        yield Tensor(block + "ffn_gate_inp.bias", (E,), 0.5)
    for part, rows, columns, gain in zip(("gate", "up", "down"), (f, f, d), (d, d, f), gains, strict=True):
        yield Tensor(f"{block}ffn_{part}_exps.weight", (E, rows, columns), gain / math.sqrt(columns))
        if biased:
            yield Tensor(f"{block}ffn_{part}_exps.bias", (E, rows), 0.5)
    if s := shape.shared_ffn:
        for part, rows, columns in (("gate", s, d), ("up", s, d), ("down", d, s)):
            yield Tensor(f"{block}ffn_{part}_shexp.weight", (rows, columns), 1.3 / math.sqrt(columns))
