"""Control tokens by name and metadata, and the end tokens among them, as in llama.cpp."""

import random

import pytest
from gguf import TokenType

from tests.llama_cpp import LlamaCpp
from tests.text.small import BYTE, CONTROL, NORMAL, USER_DEFINED, byte_level, sentencepiece, tokenizer_of, write_model
from worker.text import control_tokens
from worker.text.vocabulary import Vocabulary

OTHERS = (
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>", "<|im_start|>", "<|start|>", "<|channel|>"),
    *("<|message|>", "<|constrain|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>", "<stop!>"),
)
NAMES = (*sorted(control_tokens.END_NAMES), *OTHERS)
ROLES = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep", "padding", "unknown", "mask", "fim_pre", "bos")
TYPES = (NORMAL, CONTROL, USER_DEFINED, TokenType.UNUSED, TokenType.UNKNOWN)


def vocabulary(*rows, base=byte_level, **ids) -> dict:
    """Metadata of a small vocabulary with rows (name, type); `ids` maps a role to its token."""
    metadata = base(names=())
    metadata.pop("tokenizer.chat_template", None)
    for name, kind in rows:
        metadata["tokenizer.ggml.tokens"].append(name)
        metadata["tokenizer.ggml.token_type"].append(int(kind))
    if base is sentencepiece:
        metadata["tokenizer.ggml.scores"] += [0.0] * len(rows)
    named = {f"tokenizer.ggml.{role}_token_id": metadata["tokenizer.ggml.tokens"].index(t) for role, t in ids.items()}
    return metadata | named


def ends(vocab: Vocabulary) -> set[str]:
    return {vocab.tokens[i] for i in vocab.end_ids}


def some_vocabulary(rng: random.Random) -> dict:
    names = rng.sample(NAMES, rng.randint(1, 9))
    for group, chance in ((("<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"), 0.5), (NAMES, 0.2)):
        names += rng.sample(group, 4) if rng.random() < chance else []
    if rng.random() < 0.2:
        names += ["</s>", "<|tool_response>"]
    base = rng.choice((byte_level, byte_level, sentencepiece))
    names = [name for name in dict.fromkeys(names) if base is byte_level or name != "</s>"] or ["<eos>"]
    ids = {role: rng.choice(names) for role in rng.sample(ROLES, rng.randint(0, 3))}
    if base is byte_level or rng.random() < 0.5:
        ids["eos"] = rng.choice(names)
    return vocabulary(*((name, rng.choice(TYPES)) for name in names), base=base, **ids)


def test_the_end_tokens_of_small_vocabularies_are_llama_cpp_s(tmp_path):
    rng = random.Random(1)
    for case in range(120):
        metadata = some_vocabulary(rng)
        vocab = tokenizer_of(metadata).vocab
        with LlamaCpp(write_model(tmp_path / "model.gguf", metadata)) as llama_cpp:
            rows = [row for row, token in enumerate(vocab.tokens) if len(token) > 2 and vocab.types[row] != BYTE]
            assert vocab.end_ids == {row for row in rows if llama_cpp.ends_at(row)}, case


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", sorted(control_tokens.END_NAMES))
def test_a_known_end_token_ends_an_answer_and_is_control_whatever_its_type(name, kind):
    tokenizer = tokenizer_of(vocabulary((name, kind)))
    row = tokenizer.vocab.ids[name]
    assert tokenizer.vocab.end_ids == {row}
    assert tokenizer.encode(f"h{name}h", special=True).count(row) == 1
    assert row not in tokenizer.encode(f"h{name}h")
    assert (tokenizer.token_bytes(row), tokenizer.piece(row)) == (b"", name)


@pytest.mark.parametrize(
    "name", ["<|end_of_turn|>", "<|END_RESPONSE|>", "<|eot|>", "<|EOT|>", "<|user|>", "<|im_start|>"]
)
def test_other_control_tokens_end_an_answer_only_if_metadata_names_them(name):
    assert ends(tokenizer_of(vocabulary((name, CONTROL))).vocab) == set()
    for role in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"):
        assert ends(tokenizer_of(vocabulary((name, CONTROL), **{role: name})).vocab) == {name}
    assert ends(tokenizer_of(vocabulary((name, CONTROL), bos=name, padding=name)).vocab) == set()


def test_the_end_of_a_harmony_message_or_an_html_tag_is_no_end_token():
    for others in (("<|return|>", "<|call|>"), ("<|return|>", "<|calls|>"), ("<|flush|>", "<|call|>")):
        vocab = tokenizer_of(
            vocabulary(("<|end|>", CONTROL), *((name, NORMAL) for name in others), eos="<|end|>")
        ).vocab
        assert ends(vocab) == set(others)
        assert vocab.types[vocab.ids["<|end|>"]] == CONTROL
    vocab = tokenizer_of(vocabulary(("</s>", NORMAL), ("<|tool_response>", CONTROL), eos="</s>")).vocab
    assert ends(vocab) == {"<|tool_response>"}


ROW_ROLES = (*ROLES, "eos", "seperator", "fim_suf", "fim_mid", "prefix", "suffix", "middle")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("role", ROW_ROLES)
def test_a_token_that_metadata_names_is_control_whatever_its_type(role, kind):
    tokenizer = tokenizer_of(vocabulary(("<stop!>", kind), **{role: "<stop!>"}))
    row = tokenizer.vocab.ids["<stop!>"]
    assert row in tokenizer.encode("h<stop!>h", special=True)
    assert row not in tokenizer.encode("h<stop!>h")
    assert tokenizer.token_bytes(row) == b""
    assert tokenizer.vocab.padding_ids == frozenset()


@pytest.mark.parametrize("base", [byte_level, sentencepiece])
def test_a_word_that_metadata_names_stays_ordinary_text(base):
    tokenizer = tokenizer_of(vocabulary(base=base, padding="he"))
    row = tokenizer.vocab.ids["he"]
    assert tokenizer.token_bytes(row) == b"he"
    assert row in tokenizer.encode("lhe") == tokenizer.encode("lhe", special=True)


def test_padding_rows_stay_padding_if_metadata_names_one():
    vocab = tokenizer_of(
        vocabulary(("[PAD7]", TokenType.UNUSED), ("[PAD8]", CONTROL), padding="[PAD7]", unknown="[PAD8]")
    ).vocab
    assert vocab.padding_ids == {vocab.ids["[PAD7]"], vocab.ids["[PAD8]"]}
    assert vocab.special == {}


@pytest.mark.parametrize("kind", TYPES)
def test_names_of_turns_and_headers_are_control_whatever_their_type(kind):
    names = ("<|im_start|>", "<s>", "<start_of_turn>", "<|start_header_id|>", "<|channel|>", "<|message|>", "[INST]")
    tokenizer = tokenizer_of(vocabulary(*((name, kind) for name in names)))
    text, rows = "".join(names), [tokenizer.vocab.ids[name] for name in names]
    assert tokenizer.encode(text, special=True) == rows
    assert not set(rows) & set(tokenizer.encode(text))


def test_a_file_without_types_has_control_tokens_by_their_looks():
    metadata = vocabulary(("<|my_tag|>", NORMAL), ("<｜Tag▁2｜>", NORMAL), ("<tag>", NORMAL), ("<|>", NORMAL))
    del metadata["tokenizer.ggml.token_type"]
    assert tokenizer_of(metadata).vocab.special.keys() == {"<|my_tag|>", "<｜Tag▁2｜>"}
