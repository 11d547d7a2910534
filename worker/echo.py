"""A model that repeats its prompt: `worker run --echo`, for queue and load tests without a GPU.

Its vocabulary is the space and the 256 bytes, so it accepts every text and answers are known
beforehand. `EchoRunner` is the simple implementation of the Runner protocol (`worker/model.py`).
"""

import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain, cycle, islice

from gguf import TokenType

from worker.backend import MemoryUse
from worker.engine import Engine, EngineSettings
from worker.engine.kv_blocks import blocks_for
from worker.errors import InvalidRequest
from worker.model import Chunk, DraftSupport, OnLaunched, SlotDraw, SlotStart, StepWait
from worker.ops import Ints
from worker.runtime import LoadedModel, Progress
from worker.sampling import Draw
from worker.text.tokenizer import load_tokenizer

_NO_GRAMMAR = ("response_format", "the echo model can't follow it", None)
_CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
_SPACE = "▁"
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class EchoRunner:
    """The token of index i is the prompt's token i modulo its length, whatever the parameters.

    A sequence with a grammar fails, since the echo of its prompt would not follow the grammar.
    Each step takes at least `step_s` seconds.
    """

    step_wait: StepWait | None = None
    drafts: DraftSupport | None = None

    def __init__(self, vocab_size: int, kv_blocks: int, step_s: float = 0.0, slots: int = 1) -> None:
        self.vocab_size = vocab_size
        self.kv_blocks = kv_blocks
        self.slots = slots
        self._step_s = step_s
        self._draw = cache(Draw)
        self._generating: dict[int, Iterator[Draw]] = {}
        """The next draws of each slot."""

    def run(self, chunks: Sequence[Chunk], on_launched: OnLaunched = lambda: None) -> list[SlotDraw]:
        on_launched()
        if self._step_s:
            time.sleep(self._step_s)  # stands for the device's time
        drawn, new = SlotDraw, tuple.__new__  # a third of the time of a call of the class
        draws = [new(drawn, (slot, next(following))) for slot, following in self._generating.items()]
        for start in [chunk.begin for chunk in chunks if chunk.begin]:
            if start.sampling.grammar is not None:
                draws.append(SlotDraw(start.slot, InvalidRequest.of(_NO_GRAMMAR)))
                continue
            self._generating[start.slot] = following = self._echo(start)
            draws.append(SlotDraw(start.slot, next(following)))
        return draws

    def _echo(self, start: SlotStart) -> Iterator[Draw]:
        """The draws of a sequence; it never ends, since the caller stops the slot."""
        prompt = islice(cycle(start.prompt), len(start.replay) % len(start.prompt), None)
        count = start.sampling.logprobs

        def with_logprobs(token: int) -> Draw:
            return Draw(token, 0.0, ((token, 0.0),)[:count])

        echoed = map(self._draw if count is None else with_logprobs, prompt)
        return chain(map(self._draw, start.replay), echoed)

    def first_draws(self) -> list[SlotDraw]:
        return []  # `run` has returned all draws

    def extend(self, slot: int, block_table: Ints) -> None:
        """See `Runner.extend`. The echo has no KV cache."""

    def propose(self, slot: int, draft: Sequence[int]) -> None:
        """See `Runner.propose`, which the echo does not support."""
        raise NotImplementedError

    def stop(self, slot: int) -> None:
        self._generating.pop(slot, None)

    def reset(self) -> None:
        self._generating.clear()


class NoDevice:
    """The device of a model without weights."""

    device = "none"

    def memory(self) -> MemoryUse:
        return MemoryUse()

    def non_resident(self) -> tuple[int, list[str]]:
        return 0, []


def load_echo(
    context: int,
    prefill_chunk: int,
    step_s: float,
    progress: Progress,
    *,
    prefix_cache: bool = True,
    max_running: int = 1,
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
    settings = EngineSettings(context, prefill_chunk, max_running, prefix_cache=prefix_cache)
    engine = Engine(EchoRunner(len(tokens), max_running * blocks_for(context), step_s, max_running), settings)
    progress(1, 1)
    return LoadedModel("echo", "echo-1", len(tokens), tokenizer, engine, NoDevice(), numerics_id="echo-1")
