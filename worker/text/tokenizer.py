"""Tokenizer of a model file: texts, prompts and chats to token ids, token ids to bytes.

A special token in a chat template or a raw prompt is encoded as that token; in the content of a
message it is ordinary text. Read next: vocabulary.py, special_tokens.py, bpe.py,
template_process.py.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from worker.errors import InvalidRequest, ModelLoadFailed, WorkerError
from worker.text.bpe import ByteBpe, CharacterBpe, Encoder, SentencePieceBpe
from worker.text.chat import Chat
from worker.text.special_tokens import SpecialTokens
from worker.text.template_process import BoundedTemplate, TemplateProcess
from worker.text.vocabulary import BYTE, NORMAL, USER_DEFINED, TokenizerMetadata, Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from worker.text.grammar import GrammarCompiler

# The variables of a chat template, and their names in GGUF: `seperator` is how GGUF spells it.
_TOKEN_VARIABLES = {
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
    "cls_token": "cls",
    "mask_token": "mask",
}
_C_SPACE = " \t\n\v\f\r"


class Tokenizer:
    """Text to ids and ids to bytes. `template` is an error if the file has no chat template."""

    def __init__(
        self,
        vocab: Vocabulary,
        bpe: Encoder,
        template: BoundedTemplate | ModelLoadFailed,
        template_source: str = "",
    ) -> None:
        self.vocab = vocab
        self.template_source = template_source
        """The file's chat template, or "" if it has none."""
        self._bpe = bpe
        self._template = template
        self._special = SpecialTokens(vocab.special, vocab.user_defined)
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def grammars(self) -> "GrammarCompiler":
        """The compiler of grammars for this vocabulary."""
        from worker.text.grammar import GrammarCompiler  # noqa: PLC0415  # it imports this module

        return GrammarCompiler(self)

    def prepare(self) -> None:
        """Start the processes that jobs with chats and grammars need, and compile the template.

        Takes up to a second. A template that can't be used is an error of each chat.
        """
        with contextlib.suppress(WorkerError, OSError):
            if isinstance(self._template, BoundedTemplate):
                self._template.start()  # its start takes as long as the next line
            self.grammars.prepare()
            self.require_chat()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text without BOS; `special` encodes the CONTROL tokens in it."""
        _check_unicode(text, "prompt")
        return self._encode_parts(self._special.split(text, control=special))

    @property
    def word_encoder(self) -> Callable[[str], list[int]]:
        """The encoder of ordinary text, without special tokens and without a space prefix."""
        return self._bpe.encode

    def encode_prompt(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a raw prompt, with exactly one BOS if the file adds BOS."""
        return self._with_bos(self.encode(text, special=special))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        now: datetime,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of a chat with the generation prompt.

        `now`, an aware time, is the template's clock; `kwargs` are further variables. Raises
        InvalidRequest if the model has no usable template, or the template rejects the chat.
        """
        plain = [dict(message) for message in messages]
        chat = Chat(plain, list(tools) if tools else None, tool_choice, kwargs)
        try:
            if isinstance(self._template, ModelLoadFailed):
                raise self._template
            for field, value in (("messages", plain), ("tools", chat.tools), ("chat_template_kwargs", kwargs)):
                _check_unicode("".join(_strings(value)), field)
            rendered = self._template.render(chat, now)
        except ModelLoadFailed as error:
            constraint = f"this model has no usable chat template, send a prompt: {error.message}"
            raise InvalidRequest.of(("messages", constraint, None)) from error
        except RecursionError:
            raise InvalidRequest.of(("messages", "a chat whose values are nested less deeply", None)) from None
        _check_unicode(rendered.text, "messages")  # a template may write any character
        parts = self._special.split_traced(rendered.text, lambda: rendered.requested)
        return self._with_bos(self._encode_parts(parts))

    def require_chat(self) -> None:
        """Compile the chat template. Raises ModelLoadFailed if the model has no usable one."""
        if isinstance(self._template, ModelLoadFailed):
            raise self._template
        self._template.prepare()

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's bytes in an answer: none for control, end and padding tokens."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._decode_token(token_id)
        return self._bytes[token_id]

    def piece(self, token_id: int) -> str:
        """Return a token for display: its text, or its name if it adds no text."""
        text = self.token_bytes(token_id).decode(errors="replace")
        return text or (self.vocab.tokens[token_id] if token_id < self.vocab.size else "")

    def _decode_token(self, token_id: int) -> bytes:
        vocab = self.vocab
        if token_id >= vocab.size or token_id in vocab.padding_ids or token_id in vocab.end_ids:
            return b""
        token, kind = vocab.tokens[token_id], vocab.types[token_id]
        if kind == NORMAL:
            return self._bpe.decode_token(token)
        if kind == BYTE:
            return bytes([int(token[3:5], 16)])
        return token.encode() if kind == USER_DEFINED else b""

    def _encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Encode texts and special tokens; as in llama.cpp, these restart the space prefix."""
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
        n_bos = next((n for n, token_id in enumerate(ids) if token_id != bos), len(ids))
        return [bos, *ids[n_bos:]]


def load_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer of a file from its GGUF metadata. Raises ModelLoadFailed if unsupported.

    A chat template that does not compile is not an error here: the model still takes raw prompts,
    and `encode_chat` and `require_chat` report the reason.
    """
    typed = TokenizerMetadata(metadata)
    return build_tokenizer(typed, read_vocabulary(typed))


def build_tokenizer(metadata: TokenizerMetadata, vocab: Vocabulary) -> Tokenizer:
    """Build the tokenizer of a vocabulary that was read from `metadata`."""
    bpe: Encoder
    if vocab.kind == "llama":
        bpe = SentencePieceBpe(vocab, metadata.numbers("tokenizer.ggml.scores", vocab.size, 0.0))
    else:
        merges = metadata.strings("tokenizer.ggml.merges")
        bpe = CharacterBpe(vocab, merges) if vocab.kind == "gemma4" else ByteBpe(vocab, merges)
    source = ""
    try:
        source = metadata.get("tokenizer.chat_template", str, "")
        return Tokenizer(vocab, bpe, _chat_template(source, metadata, vocab), source)
    except ModelLoadFailed as error:
        return Tokenizer(vocab, bpe, error, source)


def _chat_template(source: str, metadata: TokenizerMetadata, vocab: Vocabulary) -> BoundedTemplate:
    if not source:
        raise ModelLoadFailed("the model has no chat template", "tokenizer.chat_template", "a Jinja2 template")
    token_ids = {"bos_token": vocab.bos_id, "eos_token": vocab.eos_id}
    for name, key in _TOKEN_VARIABLES.items():
        token_ids[name] = metadata.token_id(f"tokenizer.ggml.{key}_token_id", vocab.size)
    names = {name: vocab.tokens[token_id] for name, token_id in token_ids.items() if token_id is not None}
    tool_use = metadata.get("tokenizer.chat_template.tool_use", str, "")
    return BoundedTemplate(TemplateProcess(), source, names, vocab.special, tool_use)


def _strings(value: object) -> Iterator[str]:
    """Yield the strings in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value:
            yield from _strings(item)
        if isinstance(value, Mapping):
            yield from _strings(list(value.values()))


def _check_unicode(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = f"U+{ord(text[error.start]):04X}"
        raise InvalidRequest.of((field, f"text without lone surrogates, which {lone} is", lone)) from error
