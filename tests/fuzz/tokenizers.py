"""Texts for known vocabularies, and vocabularies of random values: to ids, to bytes, to a stream of text."""

from __future__ import annotations

from collections.abc import Iterator

from tests.fuzz.source import NUMBERS, Source
from tests.text.small import HARMONY_NAMES, byte_level, sentencepiece
from worker.errors import InvalidRequest, ModelLoadFailed
from worker.text import bpe
from worker.text.detokenizer import IncrementalDetokenizer
from worker.text.parsers import answer_parser
from worker.text.pre_tokenizers import PRE_TOKENIZERS
from worker.text.tokenizer import Tokenizer, load_tokenizer

MARKS = [(mark, 4) for mark in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
VOCABULARIES = [
    byte_level(extra=MARKS),
    byte_level(names=HARMONY_NAMES, extra=[("analysis", 1), ("final", 1)]),
    byte_level(pre="llama-bpe", add_bos_token=True, bos_token_id=0),
    byte_level(pre="gpt-4o"),
    byte_level(pre="default"),
    sentencepiece(),
    sentencepiece(names=("<|user|>", "<|end|>"), add_space_prefix=False, **{"general.name": "phi-3"}),
]
TOKENIZERS = [load_tokenizer(each) for each in VOCABULARIES]
PIECES = (
    "hello", "he", " ", "  ", "\n", "\r\n", "\t", "1", "123456", "'s", "'LL", "é", "世界", "🌍", "\u0301", "\0", "▁",
    "�",
    "<|im_end|>", "<|im_start|>", "<|im_", "<think>", "</think>", "<tool_call>", '{"name": "f", "arguments": {',
    "}}", "</tool_call>",
    "<|channel|>", "analysis", "<|message|>", "<|call|>", "<function=f>", "<parameter=a>", "</parameter>", "<0x0A>",
    "a" * 64, " " * 64,
    "\ud800", "\u2028", "<s>", "</s>",
)  # fmt: skip
KEYS = (
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token")),
    *(f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "eot", "padding", "unknown", "seperator")),
    *("tokenizer.ggml.add_space_prefix", "tokenizer.ggml.suppress_tokens", "tokenizer.chat_template", "general.name"),
)
WORDS = ("gpt2", "llama", "", *sorted(PRE_TOKENIZERS), "<0x0A>", "<s>", "[PAD1]", "h e", "a b", "ab", "a", True, False)


def prepare() -> None:
    """Prepare a process that loads many tokenizers: the words that each has cached would stay in memory."""
    bpe.CACHED_WORDS = 0


def seeds() -> Iterator[bytes]:
    for n in range(len(TOKENIZERS)):
        yield bytes([1, n]) + bytes((n + 31 * i) % 256 for i in range(60))
        yield bytes([0, n]) + bytes((7 * n + 41 * i) % 256 for i in range(60))
    yield b"\1\0\4" + "Grüße, 世界 🌍 <|im_end|>".encode()


def run(data: bytes) -> None:
    source = Source(data)
    try:
        tokenizer = source.choose(TOKENIZERS) if source.byte() % 128 else load_tokenizer(_metadata(source))
    except ModelLoadFailed as error:
        error.message.encode(errors="surrogatepass")
        return
    try:
        _encode(tokenizer, source)
    except InvalidRequest as error:
        error.message.encode(errors="surrogatepass")


def _metadata(source: Source) -> dict:
    metadata = dict(source.choose(VOCABULARIES))
    for _ in source.times(4):
        key, kind = source.choose(KEYS), source.byte() % 6
        if kind == 0:
            metadata.pop(key, None)
        elif kind < 3 and isinstance(metadata.get(key), list):
            changed = metadata[key] = list(metadata[key])
            for _ in source.times(6):
                at = source.byte() * len(changed) // 256
                changed[at : at + source.byte() % 3] = source.map(lambda: _item(source), 3)
        else:
            metadata[key] = source.map(lambda: _item(source), 8) if kind == 3 else _item(source)
    return metadata


def _item(source: Source):
    kind = source.byte()
    return source.choose(WORDS) if kind % 3 == 0 else source.choose(NUMBERS) if kind % 3 == 1 else source.text()


def _encode(tokenizer: Tokenizer, source: Source) -> None:
    text = (
        "".join(source.map(lambda: source.choose(PIECES), 12))
        if source.byte() % 2
        else source.rest().decode(errors="replace")
    )
    ids = tokenizer.encode_prompt(text, special=bool(source.byte() % 2))
    size = tokenizer.vocab.size
    assert all(0 <= token < size for token in ids)
    plain = b"".join(map(tokenizer.token_bytes, ids))
    parser = answer_parser(
        tokenizer, ids[:2], [{"type": "function", "function": {"name": "f"}}], structured=source.byte() % 2 > 0
    )
    stop = [each for each in source.map(lambda: source.choose(PIECES), 3) if each]
    detokenizer = IncrementalDetokenizer(
        tokenizer, stop=stop, min_tokens=source.byte() % 3, parser=parser, silent_ids=frozenset()
    )
    published = []
    for n, token in enumerate(ids):
        step = detokenizer.push(token, last=n == len(ids) - 1)
        published.append(step.text)
        if step.stop is not None:
            break
    names = sum(len(tokenizer.vocab.tokens[token].encode()) for token in ids)  # of a mark that begins no call
    assert len("".join(published).encode()) <= 3 * len(plain) + names + 3  # invalid bytes become characters of three
