"""The 24 prompts on which SmolLM2 is compared with llama.cpp, raw or chat, and the number of greedy steps of each."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from worker.text.tokenizer import Tokenizer

PROMPTS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "smollm2_prompts.json").read_text())
STEPS = 10


def prompt_of(entry: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of an entry of PROMPTS."""
    if "messages" in entry:
        return tokenizer.encode_chat(entry["messages"], now=datetime(2026, 1, 1, tzinfo=UTC))
    return tokenizer.encode_prompt(entry["prompt"])
