"""A whole model that only echoes its prompt: `worker run --echo`, for trying out queues and for load without a GPU.

Its vocabulary is the space and the 256 bytes, so every text works and an answer is known beforehand. See
`worker/echo.py` for the runner.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from gguf import TokenType

from worker.backend import MemoryUse
from worker.echo import EchoRunner
from worker.engine import Engine, EngineSettings
from worker.engine.kv_blocks import blocks_for
from worker.model import OnLaunched, Runner
from worker.ops import Batch
from worker.runtime import LoadedModel, Progress
from worker.sampling import Draw, DrawRequest
from worker.text.tokenizer import load_tokenizer

_CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
_SPACE = "▁"
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class PacedRunner:
    """Another runner, each step of which takes at least `step_s` seconds."""

    def __init__(self, runner: Runner, step_s: float) -> None:
        self.vocab_size = runner.vocab_size
        self.kv_blocks = runner.kv_blocks
        self._runner = runner
        self._step_s = step_s

    def run(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched = lambda: None) -> list[Draw]:
        """See `Runner.run`."""
        on_launched()  # the pause is in the device's place
        time.sleep(self._step_s)
        return self._runner.run(batch, requests)


class NoDevice:
    """The device of a model without weights."""

    device = "none"

    def memory(self) -> MemoryUse:
        """Nothing."""
        return MemoryUse()

    def non_resident(self) -> tuple[int, list[str]]:
        """None."""
        return 0, []


def load_echo(
    context: int, prefill_chunk: int, step_s: float, progress: Progress, *, prefix_cache: bool = True
) -> LoadedModel:
    """A model that echoes prompts of up to `context` tokens, each step in at least `step_s` seconds."""
    tokens = [*_CONTROL, _SPACE, *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.CONTROL] * len(_CONTROL) + [TokenType.NORMAL] + [TokenType.BYTE] * 256
    tokenizer = load_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.token_type": [int(kind) for kind in types],
            "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
            "tokenizer.ggml.unknown_token_id": tokens.index("<unk>"),
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.chat_template": _TEMPLATE,
        }
    )
    runner: Runner = EchoRunner(len(tokens), blocks_for(context))
    settings = EngineSettings(context, prefill_chunk, prefix_cache=prefix_cache)
    engine = Engine(PacedRunner(runner, step_s) if step_s else runner, settings)
    progress(1, 1)
    return LoadedModel("echo", "echo-1", len(tokens), tokenizer, engine, NoDevice())
