"""The way into the engine: a text, a raw prompt or a chat becomes token ids; and what each id says in an answer.

Special tokens that a template or a raw prompt writes are found whole; those inside a message's content never are. Knows
no job and no model. Read next: vocabulary.py, byte_bpe.py or sentencepiece_bpe.py, chat_template.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from worker.errors import InvalidRequest, ModelLoadFailed
from worker.text.metadata import Metadata
from worker.text.special_tokens import SpecialTokens
from worker.text.vocabulary import BYTE, NORMAL, USER_DEFINED, Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from worker.text.chat_template import ChatTemplate

# Code points that Unicode keeps for a program's own use inside its strings; one that the messages don't hold is taken.
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_C_SPACE = " \t\n\v\f\r"


class Bpe(Protocol):
    """Ordinary text to ids and back."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, none of them special."""
        ...

    def spell(self, token: str) -> bytes:
        """Return the bytes that a NORMAL token stands for."""
        ...


class Tokenizer:
    """Text to ids and ids to bytes for one vocabulary. Build it with `load_tokenizer`."""

    def __init__(self, vocab: Vocabulary, bpe: Bpe, template: ChatTemplate | ModelLoadFailed) -> None:
        self.vocab = vocab
        self._bpe = bpe
        self._template = template
        self._special = SpecialTokens(vocab.special)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text, without BOS; with `special`, special tokens in it are found whole."""
        _check_unicode(text, "prompt")
        return self._encode_parts(self._special.split(text) if special else [text] if text else [])

    def encode_prompt(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a raw prompt; BOS once if the file wants it, whoever wrote it."""
        return self._with_bos(self.encode(text, special=special))

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, now: datetime) -> list[int]:
        """Return the ids of a chat, the model's turn opened. `now`, an aware time, is what the template calls now.

        Raises InvalidRequest if the model has no usable template or the template refuses the messages.
        """
        if isinstance(self._template, ModelLoadFailed):
            raise InvalidRequest.of(
                ("messages", f"this model can't chat, only prompts: {self._template.message}", None)
            )
        plain = [dict(message) for message in messages]
        content = "".join(value for message in plain for value in message.values())
        _check_unicode(content, "messages")
        mark = next((char for char in _NONCHARACTERS if char not in content), None)
        if mark is None:
            raise InvalidRequest.of(("messages", "not all of the noncharacters U+FDD0 to U+FDEF", None))
        guarded = [
            {key: value if key == "role" else self._special.guard(value, mark) for key, value in message.items()}
            for message in plain
        ]
        if guarded != plain:  # a template may itself refuse special tokens in content: let it see them
            self._template.render(plain, now)
        parts = self._special.split(self._template.render(guarded, now))
        return self._with_bos(
            self._encode_parts([part if isinstance(part, int) else part.replace(mark, "") for part in parts])
        )

    def require_chat(self) -> None:
        """Raise ModelLoadFailed if the model has no usable chat template, for a start that is asked to chat."""
        if isinstance(self._template, ModelLoadFailed):
            raise self._template

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to an answer: none for control, end and padding tokens."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def piece(self, token_id: int) -> str:
        """Return a token as it is shown to a person: its text, or its name if it has none of its own."""
        text = self.token_bytes(token_id).decode(errors="replace")
        return text or (self.vocab.tokens[token_id] if token_id < self.vocab.size else "")

    def _spell(self, token_id: int) -> bytes:
        vocab = self.vocab
        if token_id >= vocab.size or token_id in vocab.padding_ids or token_id in vocab.end_ids:
            return b""
        token, kind = vocab.tokens[token_id], vocab.types[token_id]
        if kind == NORMAL:
            return self._bpe.spell(token)
        if kind == BYTE:
            return bytes([int(token[3:5], 16)])
        return token.encode() if kind == USER_DEFINED else b""

    def _encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Encode text between special tokens; as in llama.cpp, its space prefix comes anew after each of them."""
        ids: list[int] = []
        after_special, strip = True, False
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                after_special, strip = True, part in self.vocab.strip_after_ids
                continue
            text = part.lstrip(_C_SPACE) if strip else part
            if text:
                ids += self._bpe.encode(" " + text if after_special and self.vocab.add_space_prefix else text)
                after_special = strip = False
        return ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.vocab.bos_id
        if bos is None or not self.vocab.add_bos:
            return ids
        written = next((n for n, token_id in enumerate(ids) if token_id != bos), len(ids))
        return [bos, *ids[written:]]


def load_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer of a GGUF file from its metadata: keys to Python values, arrays as lists or NumPy arrays.

    Raises ModelLoadFailed for a tokenizer that can't be served. A chat template that doesn't compile is no reason: the
    model still takes raw prompts, and `encode_chat` and `require_chat` say why it can't chat.
    """
    typed = Metadata(metadata)
    return build_tokenizer(typed, read_vocabulary(typed))


def build_tokenizer(metadata: Metadata, vocab: Vocabulary) -> Tokenizer:
    """The slow half of `load_tokenizer`, after its vocabulary was read; only what this file needs is imported."""
    return Tokenizer(vocab, _bpe(metadata, vocab), _template(metadata, vocab))


def _bpe(metadata: Metadata, vocab: Vocabulary) -> Bpe:
    if vocab.kind == "gpt2":
        from worker.text.byte_bpe import ByteBpe  # noqa: PLC0415

        return ByteBpe(vocab, metadata.strings("tokenizer.ggml.merges"))
    from worker.text.sentencepiece_bpe import SentencePieceBpe  # noqa: PLC0415

    return SentencePieceBpe(vocab, metadata.numbers("tokenizer.ggml.scores", vocab.size, 0.0))


def _template(metadata: Metadata, vocab: Vocabulary) -> ChatTemplate | ModelLoadFailed:
    source = metadata.text("tokenizer.chat_template", "")
    if not source:
        return ModelLoadFailed("the model has no chat template", "tokenizer.chat_template", "a Jinja2 template")
    from worker.text.chat_template import ChatTemplate  # noqa: PLC0415

    rows = {"bos_token": vocab.bos_id, "eos_token": vocab.eos_id}
    for name, key in (("unk_token", "unknown"), ("pad_token", "padding")):
        rows[name] = metadata.row(f"tokenizer.ggml.{key}_token_id", vocab.size)
    try:
        return ChatTemplate(source, {name: "" if row is None else vocab.tokens[row] for name, row in rows.items()})
    except ModelLoadFailed as error:
        return error


def _check_unicode(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = f"U+{ord(text[error.start]):04X}"
        raise InvalidRequest.of((field, f"text without lone surrogates, which {lone} is", lone)) from error
