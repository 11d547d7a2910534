"""Vocabularies of a few hundred rows that work as their big models' do: BPE of bytes or characters, or SentencePiece.

Each has control tokens, a chat template of the model's own shape and padding rows, in metadata keys and token types as
llama.cpp's converter writes them. Knows no weights; read `tests/tiny_models.py` next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice, product

import gguf
from gguf import TokenType

# Each joins two tokens into a third. "12" shows whether digits are split, ".\n\n" is one token (a stop string isn't),
# "é", "п" and "日" are made of bytes that are no text alone.
MERGES = (
    *("Ġ t", "h e", "Ġt he", "i n", "e r", "Ġ a", "o n", "r e", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"),
    *("e l", "h el", "l o", "hel lo", "Ġ Ġ", "ĠĠ ĠĠ", "1 2", "12 3", "Ċ Ċ", ". ĊĊ", "Ã ©", "Ð ¿", "æ Ĺ", "æĹ ¥"),
)
# SentencePiece merges the pair whose joint piece scores highest: earlier ones here.
PIECES = (
    *("▁▁", "▁t", "er", "in", "▁a", "en", "on", "▁th", "es", "▁s", "▁the", "re", "he", "or", "▁w", "▁wor", "ld"),
    *("▁world", "el", "ll", "▁h", "▁he", "▁hell", "▁hello", "12", "123", "▁▁▁▁", "ein", "日本"),
)
CHARACTER_MERGES = (
    *(
        "\n \n",
        "▁ ▁",
        "▁▁ ▁▁",
        "h e",
        "▁ t",
        "▁t he",
        "l l",
        "he ll",
        "hell o",
        "▁ w",
        "o r",
        "▁w or",
        "l d",
        "▁wor ld",
    ),
    *("1 2", "12 3", "日 本"),
)
LETTERS = "▁" + "".join(map(chr, range(33, 127))) + "éüßпрдя日本語"

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a tiny assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>' + '\n' }}{% endif %}{% endfor %}"
)
GEMMA3 = (
    "{{ bos_token }}{%- set begin = '' %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set begin = messages[0]['content'] + '\n\n' %}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for message in messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{%- endif %}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (begin if loop.first else '') + message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
)
GEMMA4 = (
    "{{ bos_token }}{%- for message in messages %}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|turn>' + role + '\n' + message['content'] | trim + '<turn|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|turn>model\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {%- if message['role'] not in ['system', 'user', 'assistant'] %}\n"
    "        {{- raise_exception('no such role: ' + message['role']) }}\n"
    "    {%- endif %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "    {{- message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
HARMONY = (
    "{{- '<|start|>system<|message|>You are a tiny model.\\nCurrent date: ' + strftime_now('%Y-%m-%d') }}\n"
    "{{- '\\n\\nReasoning: ' + reasoning_effort | default('medium') }}\n"
    "{{- '\\n\\n# Valid channels: analysis, commentary, final.<|end|>' }}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}\n"
    "    {%- else %}\n"
    "        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start|>assistant' }}\n"
    "{%- endif %}\n"
)


@dataclass(frozen=True)
class Vocabulary:
    """What sets one vocabulary apart from another; the special ids are given by token."""

    pre: str
    """The name of the pre-tokenizer, which a vocabulary of characters lacks."""
    controls: tuple[str, ...]
    special: dict[str, str]
    add_bos: bool
    template: str
    rows: int
    padding_type: TokenType = TokenType.UNUSED
    first: Mapping[str, TokenType] = field(default_factory=dict)
    """Tokens before the bytes of a vocabulary with byte fallback; a byte-level one has none."""
    kind: str = "gpt2"
    """gpt2, llama or gemma4, as `tokenizer.ggml.model` names them."""
    add_space_prefix: bool = True
    more: int = 0
    """Tokens of two and three letters beside the listed ones, each with its merge or score."""


VOCABULARIES = {
    "qwen2": Vocabulary(
        pre="qwen2",
        controls=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        special={"eos": "<|endoftext|>", "padding": "<|endoftext|>", "bos": "<|endoftext|>"},
        add_bos=False,
        template=CHATML,
        rows=320,
    ),
    "phi3": Vocabulary(
        pre="default",
        controls=("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"),
        special={"bos": "<s>", "eos": "<|endoftext|>", "unknown": "<unk>", "padding": "<|endoftext|>"},
        add_bos=True,
        template=PHI3,
        rows=416,
        padding_type=TokenType.UNKNOWN,
        kind="llama",
        first={"<unk>": TokenType.CONTROL, "<s>": TokenType.CONTROL, "</s>": TokenType.USER_DEFINED},
    ),
    "gemma3": Vocabulary(
        pre="default",
        controls=("<start_of_turn>", "<end_of_turn>"),
        special={"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>"},
        add_bos=True,
        template=GEMMA3,
        rows=416,
        kind="llama",
        first=dict.fromkeys(("<pad>", "<eos>", "<bos>", "<unk>"), TokenType.CONTROL)
        | dict.fromkeys(("<mask>", "\n", "\n\n"), TokenType.USER_DEFINED),
        add_space_prefix=False,
    ),
    "gemma4": Vocabulary(
        pre="",
        controls=("<|turn>", "<turn|>"),
        special={"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>", "mask": "<mask>"},
        add_bos=True,
        template=GEMMA4,
        rows=448,
        kind="gemma4",
        first=dict.fromkeys(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), TokenType.CONTROL),
        add_space_prefix=False,
    ),
    "gpt-oss": Vocabulary(
        pre="gpt-4o",
        controls=(
            *("<|startoftext|>", "<|endoftext|>", "<|reserved_2|>", "<|return|>", "<|constrain|>", "<|channel|>"),
            *("<|start|>", "<|end|>", "<|message|>", "<|call|>", "<|endofprompt|>"),
        ),
        special={"bos": "<|startoftext|>", "eos": "<|return|>", "padding": "<|endoftext|>"},
        add_bos=False,
        template=HARMONY,
        rows=320,
    ),
    "llama": Vocabulary(
        pre="llama-bpe",
        controls=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        ),
        special={"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        add_bos=True,
        template=LLAMA3,
        rows=320,
        padding_type=TokenType.USER_DEFINED,
    ),
}
VOCABULARIES |= dict.fromkeys(("qwen3", "qwen3moe"), VOCABULARIES["qwen2"])
VOCABULARIES |= dict.fromkeys(("granite", "granitemoe", "mistral3", "smollm3"), VOCABULARIES["llama"])


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of its vocabulary's first ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write the tokenizer's metadata."""
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in MERGES)]
    if vocabulary.kind == "llama":
        rows = _sentencepiece_rows(vocabulary)
    elif vocabulary.kind == "gemma4":
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in CHARACTER_MERGES)]
        merges += _more(list(LETTERS), {left + right for left, right in merges}, vocabulary.more)
        rows = _character_rows(vocabulary, merges)
    else:
        merges += _more(byte_alphabet(), {left + right for left, right in merges}, vocabulary.more)
        rows = _byte_level_rows(merges)
    rows += [(token, TokenType.CONTROL, -1000.0) for token in vocabulary.controls]
    rows += [(f"[PAD{i}]", vocabulary.padding_type, -10000.0) for i in range(len(rows), vocabulary.rows)]
    tokens = [token for token, _, _ in rows]
    assert len(set(tokens)) == vocabulary.rows, f"{len(set(tokens))} different tokens in {vocabulary.rows} rows"

    writer.add_tokenizer_model(vocabulary.kind)
    if vocabulary.pre:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(tokens)
    if vocabulary.first:
        writer.add_token_scores([score for _, _, score in rows])
    writer.add_token_types([kind for _, kind, _ in rows])
    if vocabulary.kind != "llama":
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    for role, token in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", tokens.index(token))
    writer.add_add_bos_token(vocabulary.add_bos)
    if not vocabulary.add_space_prefix:
        writer.add_add_space_prefix(False)
    writer.add_chat_template(vocabulary.template)


def _byte_level_rows(merges: list[tuple[str, str]]) -> list[tuple[str, TokenType, float]]:
    tokens = byte_alphabet() + [left + right for left, right in merges]
    return [(token, TokenType.NORMAL, 0.0) for token in tokens]


def _first_rows(vocabulary: Vocabulary) -> list[tuple[str, TokenType, float]]:
    """Special tokens, and the 256 bytes."""
    first = [(token, kind, -1000.0) for token, kind in vocabulary.first.items()]
    return first + [(f"<0x{byte:02X}>", TokenType.BYTE, 0.0) for byte in range(256)]


def _character_rows(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> list[tuple[str, TokenType, float]]:
    tokens = [*LETTERS, "\n", *(left + right for left, right in merges)]
    return _first_rows(vocabulary) + [(token, TokenType.NORMAL, 0.0) for token in tokens]


def _sentencepiece_rows(vocabulary: Vocabulary) -> list[tuple[str, TokenType, float]]:
    """The order of published files: special tokens, the 256 bytes, the pieces, the single letters."""
    first = _first_rows(vocabulary)
    more = _more(list(LETTERS), set(PIECES), vocabulary.more)
    normal = [*PIECES, *(left + right for left, right in more), *LETTERS]
    return first + [(token, TokenType.NORMAL, -float(i)) for i, token in enumerate(normal)]


def _more(letters: list[str], known: set[str], count: int) -> list[tuple[str, str]]:
    """The first `count` pairs that join to no known token: two letters, then two and a third."""
    triples = ((first + second, third) for first, second, third in product(letters, repeat=3))
    pairs: Iterator[tuple[str, str]] = chain(product(letters, repeat=2), triples)
    return list(islice(((left, right) for left, right in pairs if left + right not in known), count))
