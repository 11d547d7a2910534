"""Write `tests/data/smollm2_llama_cpp.npz`: llama.cpp's greedy answers to 24 prompts.

    python -m tests.gpu.make_smollm2_golden

The weights are those of the published Q4_1 file converted to F32, so llama.cpp does not quantize
activations, and a GPU machine needs no second engine. Per prompt: its ids, the greedy ids of STEPS
steps, and each step's 20 best as ids and nats.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from tests.llama_cpp import LlamaCpp, write_f32_copy
from tests.smollm2_prompts import PROMPTS, STEPS, prompt_of
from worker import hub
from worker.config import load_settings
from worker.gguf_file import GgufFile
from worker.text.tokenizer import load_tokenizer

TARGET = Path(__file__).parents[1] / "data" / "smollm2_llama_cpp.npz"
TOP = 20


def main() -> None:
    source = hub.resolve("smollm2", load_settings().hub.cache)
    with GgufFile.open(source) as file:
        tokenizer = load_tokenizer(file.metadata)
    prompts = [prompt_of(entry, tokenizer) for entry in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        copy = write_f32_copy(source, Path(folder) / "f32.gguf")
        with LlamaCpp(copy, context=1024) as other:
            answers = [other.greedy(prompt, STEPS, ends=tokenizer.vocab.end_ids, count=TOP) for prompt in prompts]
    arrays = {}
    for entry, prompt, steps in zip(PROMPTS, prompts, answers, strict=True):
        name = entry["name"]
        arrays[f"{name}/prompt"] = np.array(prompt, np.int32)
        arrays[f"{name}/ids"] = np.array([step.token for step in steps], np.int32)
        arrays[f"{name}/top"] = np.array([[token for token, _ in step.top] for step in steps], np.int32)
        arrays[f"{name}/logprobs"] = np.array([[value for _, value in step.top] for step in steps], np.float32)
    np.savez_compressed(TARGET, **arrays)
    print(json.dumps({"prompts": len(prompts), "steps": sum(map(len, answers)), "bytes": TARGET.stat().st_size}))


if __name__ == "__main__":
    main()
