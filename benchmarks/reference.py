"""Reference figures for four files on one H100: llama.cpp's, and the goals set for this worker.

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
