"""Reference figures for four files on one H100: other engines', and the goals for this worker.

Origin: the project's issue on speed, October 2026. llama.cpp of that month, built for sm_90 with
CUDA 13, flash attention on, micro-batch 2,048, the same files (random weights at the models' exact
shapes and type mixes), one H100 80GB HBM3 with a read bandwidth of 3.03 TB/s. llama.cpp's start is
from process start to the first token.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reference:
    """Goals and llama.cpp's figures of one model; decode and prefill in tokens per second."""

    min_decode: float
    target_decode: float
    min_prefill: float
    """At 2,048 tokens."""
    max_first_token_ms: float
    """95th percentile through the server, prompt of 128 tokens."""
    max_start_s: float
    target_start_s: float
    llama_decode: dict[int, float]
    """By tokens of context."""
    llama_prefill: dict[int, float]
    """By tokens of the prompt."""
    llama_start_s: float


REFERENCES = {
    "qwen2.5-0.5b": Reference(
        1600, 2500, 90_000, 6, 1.5, 1.0,
        {0: 893, 3500: 821}, {128: 17_300, 512: 46_700, 2048: 59_200, 8192: 74_200}, 1.0,
    ),
    "llama-3.2-1b": Reference(
        1500, 2100, 75_000, 6, 1.5, 1.0,
        {0: 896, 3500: 830}, {128: 20_100, 512: 39_200, 2048: 39_700, 8192: 50_900}, 1.0,
    ),
    "phi-3-mini": Reference(
        650, 900, 30_000, 10, 1.8, 0.8,
        {0: 337, 3500: 234}, {128: 10_800, 512: 15_600, 2048: 15_000, 8192: 11_600}, 0.8,
    ),
    "gpt-oss-20b": Reference(
        550, 750, 22_000, 15, 3.5, 2.2,
        {0: 319, 3500: 307}, {128: 3_500, 512: 10_300, 2048: 12_000, 8192: 14_500}, 2.5,
    ),
}  # fmt: skip
"""By file name without extension."""

NAMES = {
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "llama-3.2-1b": "Llama-3.2-1B",
    "phi-3-mini": "Phi-3-mini",
    "gpt-oss-20b": "GPT-OSS-20B",
}
"""The models' names by file name without extension, in the order of tables."""


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Goals and other engines' figures of decode of several sequences: tokens/s in all by number.

    The other engines were measured on 2026-11-26 on an H100 80GB: 128-token prompts, 128 generated
    tokens, greedy, without detokenization. llama.cpp ran the same files. vLLM 0.24 ran bf16
    weights, of gpt-oss-20b MXFP4 with dummy values, which probably concentrates the routes on few
    experts.
    """

    at_least: dict[int, float]
    aim: dict[int, float]
    llama: dict[int, float]
    vllm: dict[int, float]


AT_ONCE = {
    "qwen2.5-0.5b": AtOnce(
        {1: 2_305, 8: 10_000, 32: 30_000, 64: 45_000, 256: 70_000},
        {8: 16_000, 32: 50_000, 64: 80_000, 256: 130_000},
        {1: 900, 8: 4_000, 32: 6_800, 64: 10_400, 128: 13_200},
        {1: 674, 8: 5_200, 32: 17_700, 64: 25_100, 128: 41_200, 256: 47_800},
    ),
    "llama-3.2-1b": AtOnce(
        {1: 2_075, 8: 8_000, 32: 22_000, 64: 36_000, 256: 62_000},
        {8: 13_000, 32: 38_000, 64: 54_000, 256: 75_000},
        {1: 895, 8: 3_600, 32: 9_300, 64: 11_600, 128: 13_900},
        {1: 494, 8: 4_300, 32: 12_200, 64: 28_900, 128: 45_900, 256: 60_700},
    ),
    "phi-3-mini": AtOnce(
        {1: 797, 8: 2_800, 32: 7_000, 64: 9_500, 256: 13_000},
        {8: 3_800, 32: 9_000, 64: 14_000, 256: 16_000},
        {1: 336, 8: 1_500, 32: 3_500, 64: 4_200, 128: 4_700},
        {1: 250, 8: 1_800, 32: 5_400, 64: 8_100, 128: 11_000, 256: 12_700},
    ),
    "gpt-oss-20b": AtOnce(
        {1: 686, 8: 1_600, 32: 4_500, 64: 8_000, 256: 20_000},
        {8: 2_000, 32: 5_600, 64: 10_600, 256: 30_000},
        {1: 318, 8: 880, 32: 1_500, 64: 2_300, 128: 3_100},
        {1: 311, 8: 2_200, 32: 8_200, 64: 12_600, 128: 17_600, 256: 26_500},
    ),
}
"""By file name without extension."""
