"""A model whose answers are texts that a test chooses by the prompt; one token for each byte."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, repeat
from pathlib import Path

from tests.text.small import byte_level
from worker.echo import EchoRunner, NoDevice
from worker.engine import Engine, EngineSettings
from worker.engine.kv_blocks import blocks_for
from worker.model import Chunk, OnLaunched, SlotDraw, SlotStart
from worker.runtime import LoadedModel
from worker.sampling import Draw
from worker.text.tokenizer import Tokenizer, load_tokenizer

TEMPLATES = Path(__file__).parent.parent / "data" / "templates"
NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT = 8192


def tokenizer_of(template: str) -> Tokenizer:
    """Every byte is a token; a chat template of tests/data/templates."""
    metadata = byte_level(names=NAMES)
    tokens = metadata["tokenizer.ggml.tokens"]
    source = (TEMPLATES / f"{template}.jinja").read_text("utf-8")
    eos = {"tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"), "tokenizer.ggml.add_bos_token": False}
    return load_tokenizer({**metadata, **eos, "tokenizer.chat_template": source})


class ScriptedRunner(EchoRunner):
    """Draws the bytes of `script(prompt)`, and then the end token for ever, whatever the sampling.

    Of `logprobs`, the drawn token is the likeliest and the next ids follow.
    """

    def __init__(self, tokenizer: Tokenizer, script: Callable[[str], str], slots: int, step_s: float) -> None:
        super().__init__(tokenizer.vocab.size, slots * blocks_for(CONTEXT), step_s, slots)
        self._tokenizer = tokenizer
        self._script = script
        self._end = next(iter(tokenizer.vocab.end_ids))

    def run(self, chunks: Sequence[Chunk], on_launched: OnLaunched = lambda: None) -> list[SlotDraw]:
        on_launched()
        if self._step_s:
            time.sleep(self._step_s)
        draws = [SlotDraw(slot, next(following)) for slot, following in self._generating.items()]
        for start in [chunk.begin for chunk in chunks if chunk.begin]:
            self._generating[start.slot] = following = self._draws(start)
            draws.append(SlotDraw(start.slot, next(following)))
        return draws

    def _draws(self, start: SlotStart) -> Iterator[Draw]:
        prompt = "".join(map(self._tokenizer.piece, start.prompt))
        text = self._script(prompt).encode()
        ids = chain(map(self._id_of, text), repeat(self._end))
        count = start.sampling.logprobs
        draws = (Draw(token) if count is None else self._with_logprobs(token, count) for token in ids)
        return chain(map(Draw, start.replay), islice(draws, len(start.replay), None))

    def _id_of(self, byte: int) -> int:
        return next(id for id in range(256) if self._tokenizer.token_bytes(id) == bytes([byte]))

    def _with_logprobs(self, token: int, count: int) -> Draw:
        top = [(token, -0.25), *(((token + n) % 256, -0.25 - n) for n in range(1, 20))]
        return Draw(token, -0.25, tuple(top[:count]))


def scripted_model(
    script: Callable[[str], str], *, template: str = "qwen3", name: str = "scripted", slots: int = 4, step_s: float = 0
) -> LoadedModel:
    """The model; `script` gets the rendered prompt and returns the answer with its markup."""
    tokenizer = tokenizer_of(template)
    runner = ScriptedRunner(tokenizer, script, slots, step_s)
    engine = Engine(runner, EngineSettings(CONTEXT, 512, slots, prefix_cache=False))
    return LoadedModel(name, "scripted-1", runner.vocab_size, tokenizer, engine, NoDevice(), numerics_id="scripted-1")


def last_user(prompt: str) -> str:
    """The text of the last user message in a rendered ChatML prompt."""
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
