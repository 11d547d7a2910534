"""A model that repeats its prompt: `worker run --echo`, for queue and load tests without a GPU.

Its vocabulary is the space and the 256 bytes, so it accepts every text and answers are known
beforehand. `EchoRunner` is the simple implementation of the Runner protocol (`worker/model.py`).
"""

import time
from collections.abc import Sequence

from gguf import TokenType

from worker.backend import MemoryUse
from worker.engine import Engine, EngineSettings
from worker.engine.kv_blocks import blocks_for
from worker.model import OnLaunched
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


class EchoRunner:
    """The token of index i is the prompt's token i modulo its length, whatever the parameters.

    Each step takes at least `step_s` seconds.
    """

    def __init__(self, vocab_size: int, kv_blocks: int, step_s: float = 0.0) -> None:
        self.vocab_size = vocab_size
        self.kv_blocks = kv_blocks
        self._step_s = step_s

    def run(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched = lambda: None) -> list[Draw]:
        on_launched()
        if self._step_s:
            time.sleep(self._step_s)  # stands for the device's time
        return [_echo(request) for request in requests]


class NoDevice:
    """The device of a model without weights."""

    device = "none"

    def memory(self) -> MemoryUse:
        return MemoryUse()

    def non_resident(self) -> tuple[int, list[str]]:
        return 0, []


def load_echo(
    context: int, prefill_chunk: int, step_s: float, progress: Progress, *, prefix_cache: bool = True
) -> LoadedModel:
    """A model that echoes prompts of up to `context` tokens, in `step_s` seconds or more a step."""
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
    settings = EngineSettings(context, prefill_chunk, prefix_cache=prefix_cache)
    engine = Engine(EchoRunner(len(tokens), blocks_for(context), step_s), settings)
    progress(1, 1)
    return LoadedModel("echo", "echo-1", len(tokens), tokenizer, engine, NoDevice(), numerics_id="echo-1")


def _echo(request: DrawRequest) -> Draw:
    if request.forced is not None:
        return Draw(request.forced)
    token = request.prompt[request.index % len(request.prompt)]
    if request.sampling.logprobs is None:
        return Draw(token)
    return Draw(token, 0.0, ((token, 0.0),)[: request.sampling.logprobs])
