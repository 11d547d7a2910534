"""Full-size GGUF files with random weights: shapes, types and vocabulary sizes of published Q4_K_M files.

    python -m tests.full_size_models MODEL FILE.gguf [--layers N] [--seed N]

Speed, memory and numerics at full size need no trained weights. The same bytes from the same seed; a matrix is made in
memory and written before the next one. With --layers only the first layers are written. `tests/tiny_models.py` writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType, TokenType

from tests.tiny_models import TINY, Tensor, TinyShape, write_model
from tests.tiny_vocabulary import MERGES, VOCABULARIES, Vocabulary

_QWEN3 = replace(VOCABULARIES["qwen3"], rows=151936, more=151387 - len(MERGES))
_GEMMA3 = replace(VOCABULARIES["gemma3"], rows=262208, more=261_000)
_MISTRAL = Vocabulary(
    pre="default",
    controls=("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    special={"bos": "<s>", "eos": "</s>", "unknown": "<unk>"},
    add_bos=True,
    template=(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}"
        "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    rows=32768,
    kind="llama",
    first={"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL},
    more=32_000,
)

FULL_SIZE: dict[str, TinyShape] = {
    "qwen3-4b": replace(
        TINY["qwen3"], layers=36, width=2560, heads=32, kv_heads=8, ffn=9728, context=40960, big_vocabulary=_QWEN3
    ),
    "qwen3-30b-a3b": replace(
        TINY["qwen3moe"],
        layers=48,
        width=2048,
        heads=32,
        kv_heads=4,
        ffn=6144,
        experts=128,
        expert_ffn=768,
        context=40960,
        metadata={
            **TINY["qwen3moe"].metadata,
            "expert_count": 128,
            "expert_used_count": 8,
            "expert_feed_forward_length": 768,
        },
        big_vocabulary=_QWEN3,
    ),
    "gemma3-4b": replace(
        TINY["gemma3"],
        layers=34,
        width=2560,
        heads=8,
        kv_heads=4,
        ffn=10240,
        context=131072,
        metadata={
            **{key: value for key, value in TINY["gemma3"].metadata.items() if "pattern" not in key},
            "attention.sliding_window": 1024,
        },
        post_norm=3.0,  # the head is the embedding: what the layers add must outweigh the token's own row
        big_vocabulary=_GEMMA3,
    ),
    "mistral-7b": replace(
        TINY["llama"],
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14336,
        context=32768,
        tied=False,
        metadata={
            "rope.freq_base": 1e6,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 128,
            "vocab_size": 32768,
        },
        big_vocabulary=_MISTRAL,
    ),
}
"""Qwen3-4B, Qwen3-30B-A3B, the text model of Gemma-3-4B-it and Mistral-7B-v0.3."""


def make_full_size(name: str, path: Path, *, layers: int | None = None, seed: int = 0) -> Path:
    """Write the model `FULL_SIZE[name]`, or its first `layers` layers, and return the file's path.

    Raises ValueError for a number of layers that the model does not have.
    """
    shape = FULL_SIZE[name]
    kind_of = q4_k_m(shape)
    layers = shape.layers if layers is None else layers
    if not 1 <= layers <= shape.layers:
        raise ValueError(f"{name}: {layers} layers; expected 1 to {shape.layers}")
    shape = replace(shape, layers=layers)
    return write_model(path, shape, f"random {name}", LlamaFileType.MOSTLY_Q4_K_M, kind_of, seed)


def q4_k_m(shape: TinyShape) -> Callable[[Tensor], Type]:
    """Types of llama.cpp's Q4_K_M: Q6_K for the head, and for attn_v and ffn_down of about half of the layers."""
    head, n = "token_embd.weight" if shape.tied else "output.weight", shape.layers

    def kind(tensor: Tensor) -> Type:
        if tensor.name == head:
            return Type.Q6_K
        if not any(part in tensor.name for part in ("attn_v", "ffn_down")):
            return Type.Q4_K
        i = int(tensor.name.split(".")[1])
        return Type.Q6_K if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 else Type.Q4_K

    return kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=FULL_SIZE, metavar="MODEL", help=", ".join(FULL_SIZE))
    parser.add_argument("path", type=Path, metavar="FILE.gguf")
    parser.add_argument("--layers", type=int, metavar="N", help="write only the first N layers")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    try:
        make_full_size(chosen.model, chosen.path, layers=chosen.layers, seed=chosen.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
