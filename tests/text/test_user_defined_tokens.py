"""USER_DEFINED tokens in any text, against llama.cpp: which are found, and the text around them."""

import random
from datetime import UTC, datetime

import pytest

from tests.llama_cpp import LlamaCpp
from tests.text.small import CONTROL, USER_DEFINED, byte_level, pieces_of, sentencepiece, tokenizer_of, write_model

NAMES = ("<tool_call>", "</tool_call>", "<think>", "</think>", "  ", "    ", "→", "<b>")
WORDS = (
    *NAMES,
    "<|im_start|>",
    "<|im_end|>",
    "he",
    "hell",
    " ",
    "\n",
    "h",
    "<",
    "<tool",
    "<|im_",
    "end|>",
    ">",
    "é",
    "l ",
)


def vocabulary(base) -> dict:
    metadata = base(names=())
    for key, values in (("tokens", (*NAMES, "<|im_start|>", "<|im_end|>")), ("token_type", [4] * len(NAMES) + [3] * 2)):
        metadata[f"tokenizer.ggml.{key}"] += values
    if base is sentencepiece:
        metadata["tokenizer.ggml.scores"] += [0.0] * (len(NAMES) + 2)
    return metadata


@pytest.mark.parametrize("base", [byte_level, sentencepiece])
@pytest.mark.parametrize("special", [False, True])
def test_user_defined_tokens_in_any_text_give_llama_cpp_s_ids(base, special, tmp_path):
    rng, metadata = random.Random(4), vocabulary(base)
    tokenizer = tokenizer_of(metadata)
    texts = ["".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(200)]
    with LlamaCpp(write_model(tmp_path / "model.gguf", metadata)) as llama_cpp:
        for text in texts:
            assert tokenizer.encode(text, special=special) == llama_cpp.tokenize(text, special=special), text


def test_user_defined_tokens_have_their_text_and_control_tokens_none():
    tokenizer = tokenizer_of(vocabulary(byte_level))
    text = "h<think>e</think>  <tool_call><|im_end|>→"
    ids = tokenizer.encode(text, special=True)
    assert pieces_of(tokenizer, ids) == ["h", "<think>", "e", "</think>", "  ", "<tool_call>", "<|im_end|>", "→"]
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text.replace("<|im_end|>", "")
    assert tokenizer.encode_prompt(text, special=False)[1] == ids[1]


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_user_defined_tokens_are_found_in_a_message_and_control_tokens_are_not(role):
    tokenizer = tokenizer_of(byte_level(extra=[("<tool_call>", USER_DEFINED), ("<|tool|>", CONTROL)]))
    content = [{"role": role, "content": "<tool_call>h<|tool|><|im_end|>"}]
    pieces = pieces_of(tokenizer, tokenizer.encode_chat(content, now=datetime.now(UTC)))
    assert pieces.count("<tool_call>") == 1
    assert "<|tool|>" not in pieces
    assert pieces.count("<|im_end|>") == 1
