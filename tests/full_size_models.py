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

_GRANITE = replace(
    VOCABULARIES["llama"],
    pre="refact",
    controls=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    special=dict.fromkeys(("bos", "eos", "padding"), "<|end_of_text|>"),
    add_bos=False,
    template=(
        "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}"
        "{{ message['content'] + '<|end_of_text|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    ),
    rows=49159,
    more=48_800,
)
_SMOLLM3 = replace(VOCABULARIES["qwen2"], pre="smaug-bpe", rows=128256, more=127_900)
_MINISTRAL3 = replace(
    VOCABULARIES["llama"],
    pre="tekken",
    controls=("<unk>", "<s>", "</s>", *_MISTRAL.controls, "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]"),
    special={"bos": "<s>", "eos": "</s>", "unknown": "<unk>", "padding": "<pad>"},
    template=_MISTRAL.template,
    rows=131072,
    more=130_000,
)
_GEMMA4 = replace(VOCABULARIES["gemma4"], rows=262144, more=261_000)
# The last layer of every six sees all tokens.
_GEMMA4_WINDOWED = (True, True, True, True, True, False) * 10

# Published shapes, from config.json of the models that the comments name.
FULL_SIZE: dict[str, TinyShape] = {
    # Qwen/Qwen3-4B
    "qwen3-4b": replace(
        TINY["qwen3"], layers=36, width=2560, heads=32, kv_heads=8, ffn=9728, context=40960, big_vocabulary=_QWEN3
    ),
    # Qwen/Qwen3-30B-A3B
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
    # google/gemma-3-4b-it
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
    # mistralai/Mistral-7B-Instruct-v0.3
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
    # ibm-granite/granite-3.3-8b-instruct
    "granite-3.3-8b": replace(
        TINY["granite"],
        layers=40,
        width=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=12800,
        context=131072,
        metadata={
            "rope.freq_base": 1e7,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 128,
            "vocab_size": 49159,
            "embedding_scale": 12.0,
            "attention.scale": 0.0078125,
            "residual_scale": 0.22,
            "logit_scale": 16.0,
        },
        big_vocabulary=_GRANITE,
    ),
    # HuggingFaceTB/SmolLM3-3B
    "smollm3-3b": replace(
        TINY["smollm3"],
        layers=36,
        width=2048,
        heads=16,
        kv_heads=4,
        head_dim=128,
        ffn=11008,
        context=65536,
        metadata={
            "rope.freq_base": 5e6,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_count": 128,
            "vocab_size": 128256,
        },
        big_vocabulary=_SMOLLM3,
    ),
    # mistralai/Ministral-3-8B-Instruct-2512
    "ministral-3-8b": replace(
        TINY["mistral3"],
        layers=34,
        width=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14336,
        context=262144,
        metadata={
            "rope.freq_base": 1e6,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 128,
            "attention.key_length": 128,
            "attention.value_length": 128,
            "vocab_size": 131072,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 16384,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.1,
        },
        big_vocabulary=_MINISTRAL3,
    ),
    # google/gemma-4-31B-it
    "gemma4-31b": replace(
        TINY["gemma4"],
        layers=60,
        width=5376,
        heads=32,
        kv_heads=4,
        ffn=21504,
        context=262144,
        windowed=_GEMMA4_WINDOWED,
        window_heads=(16, 256),
        metadata={
            **TINY["gemma4"].metadata,
            "attention.head_count_kv": [16 if windowed else 4 for windowed in _GEMMA4_WINDOWED],
            "attention.sliding_window": 1024,
            "attention.sliding_window_pattern": list(_GEMMA4_WINDOWED),
            "final_logit_softcapping": 30.0,
        },
        big_vocabulary=_GEMMA4,
    ),
    # google/gemma-4-26B-A4B-it
    "gemma4-26b-a4b": replace(
        TINY["gemma4-experts"],
        layers=30,
        width=2816,
        heads=16,
        kv_heads=2,
        ffn=2112,
        experts=128,
        expert_ffn=704,
        context=262144,
        windowed=_GEMMA4_WINDOWED[:30],
        window_heads=(8, 256),
        metadata={
            **TINY["gemma4-experts"].metadata,
            "attention.head_count_kv": [8 if windowed else 2 for windowed in _GEMMA4_WINDOWED[:30]],
            "attention.sliding_window": 1024,
            "attention.sliding_window_pattern": list(_GEMMA4_WINDOWED[:30]),
            "final_logit_softcapping": 30.0,
            "expert_count": 128,
            "expert_used_count": 8,
            "expert_feed_forward_length": 704,
        },
        big_vocabulary=_GEMMA4,
    ),
}
"""Text models only: Gemma's and Ministral's files hold no image encoder either."""


def make_full_size(name: str, path: Path, *, layers: int | None = None, seed: int = 0) -> Path:
    """Write the model `FULL_SIZE[name]`, or its first `layers` layers, and return the file's path.

    Raises ValueError for a number of layers that the model does not have.
    """
    shape = FULL_SIZE[name]
    kind_of = q4_k_m(shape)
    layers = shape.layers if layers is None else layers
    if not 1 <= layers <= shape.layers:
        raise ValueError(f"{name}: {layers} layers; expected 1 to {shape.layers}")
    metadata = {key: each[:layers] if isinstance(each, list) else each for key, each in shape.metadata.items()}
    # Only layers without a window use the divisors, and an adapter refuses a tensor that no layer uses.
    rope_tensors = {} if all(shape.windowed[:layers]) else shape.rope_tensors
    shape = replace(shape, layers=layers, metadata=metadata, rope_tensors=rope_tensors)
    return write_model(path, shape, f"random {name}", LlamaFileType.MOSTLY_Q4_K_M, kind_of, seed)


def q4_k_m(shape: TinyShape) -> Callable[[Tensor], Type]:
    """Types of llama.cpp's Q4_K_M: Q6_K for the head, and for attn_v and ffn_down of about half of the layers."""
    head, n = "token_embd.weight" if shape.tied else "output.weight", shape.layers

    def kind(tensor: Tensor) -> Type:
        if tensor.name == head:
            return Type.Q6_K
        i = int(tensor.name.split(".")[1]) if tensor.name.startswith("blk.") else 0
        more = any(part in tensor.name for part in ("attn_v", "ffn_down"))
        more = more and (i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2)
        if tensor.shape[-1] % 256:  # rows that are no whole blocks of these types
            return Type.Q8_0 if more else Type.Q5_0
        return Type.Q6_K if more else Type.Q4_K

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
