"""The targets, and what of a run is a finding."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from types import ModuleType

TARGETS = ("job_decoding", "gguf_opening", "chat_templates", "tokenizers", "gateway_requests", "gateway_app")
CPU_S = 1.0
"""CPU time of one input, above which it is a finding: other processes don't count."""
RSS_MB = 500
WALL_S = 30
"""Time after which an input is a finding even if it uses no CPU time."""
REGRESSIONS = Path(__file__).parent / "regressions"


class Finding(Exception):
    """An input takes too long."""


def target(name: str) -> ModuleType:
    """The module of a target, with `seeds` and `run`."""
    return importlib.import_module(f"tests.fuzz.{name}")


def run_within_limits(module: ModuleType, data: bytes) -> None:
    """Run one input. Any exception is a finding."""
    begun = time.process_time()
    module.run(data)
    used = time.process_time() - begun
    if used > CPU_S:
        raise Finding(f"{used:.2f} s of CPU time for one input")


def regressions(name: str) -> list[Path]:
    """The inputs that were findings."""
    return sorted((REGRESSIONS / name).glob("*"))


def dictionary(module: ModuleType) -> str:
    """Words of the target, in the notation of libFuzzer's dictionaries."""
    words = {
        word
        for key in ("FIELDS", "INNER", "WORDS", "KEYS")
        for word in getattr(module, key, ())
        if isinstance(word, str)
    }
    quoted = [
        json.dumps(word.encode(errors="replace").decode("latin-1")) for word in sorted(words) if 0 < len(word) <= 32
    ]
    return "".join(f"{word}\n" for word in quoted if "\\" not in word)
