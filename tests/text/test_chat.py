"""Chat templates: which tokens of a rendered chat are special, and the errors of a template."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text.small import byte_level, pieces_of, sentencepiece, tokenizer_of
from worker.errors import InvalidRequest, ModelLoadFailed
from worker.text.tokenizer import load_tokenizer

NOW = datetime(2025, 8, 5, 23, 30, tzinfo=UTC)
SMALL = load_tokenizer(byte_level())


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def rendered(tokenizer, messages) -> str:
    """The chat's ids as text: special tokens by name, other tokens by their bytes."""
    ids = tokenizer.encode_chat(messages, now=NOW)
    return b"".join(tokenizer.token_bytes(i) or tokenizer.piece(i).encode() for i in ids).decode()


def chat_with(template: str, content: str = "Hi", **keys) -> str:
    return rendered(tokenizer_of(byte_level(**keys), **{"tokenizer.chat_template": template}), user(content))


def rejection(template: str, content: str = "Hi") -> str:
    with pytest.raises(InvalidRequest) as error:
        chat_with(template, content)
    assert "\n" not in error.value.message
    return error.value.message


def test_the_generation_prompt_of_qwen2_s_template_ends_with_a_newline(qwen2):
    ids = qwen2.encode_chat([{"role": "system", "content": "Be terse."}, *user("Hi")], now=NOW)
    start, end, newline = 151644, 151645, 198
    assert ids[:3] == [start, *qwen2.encode("system"), newline]
    assert ids[-3:] == [start, *qwen2.encode("assistant"), newline]
    assert (ids.count(start), ids.count(end)) == (3, 2)


def test_only_a_template_s_own_default_system_prompt_is_added(qwen2):
    assert rendered(SMALL, user("Hi")) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(qwen2, user("Hi")).startswith("<|im_start|>system\nYou are a helpful assistant<|im_end|>\n")


def test_bos_is_not_added_to_phi_3_s_template_which_has_one(phi3):
    bos, user_id, hello, end, assistant = 1, 32010, 15043, 32007, 32001
    assert phi3.encode_chat(user("Hello"), now=NOW) == [bos, user_id, hello, end, assistant]


def test_bos_is_added_if_the_template_has_none():
    tokenizer = tokenizer_of(sentencepiece(), **{"tokenizer.chat_template": "<|user|>{{ messages[0].content }}"})
    assert tokenizer.encode_chat(user("he"), now=NOW) == [1, *tokenizer.encode("<|user|>he", special=True)]


def test_gpt_oss_s_template_renders_every_role(gpt_oss):
    messages = [{"role": "system", "content": "Be terse."}, *user("Hi"), {"role": "assistant", "content": "Ho"}]
    assert rendered(gpt_oss, [*messages, *user("Bye")]) == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-05\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe terse.\n\n<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Ho<|end|>"
        "<|start|>user<|message|>Bye<|end|><|start|>assistant"
    )


def test_gpt_oss_s_template_rejects_channel_tags_in_an_assistant_s_content(gpt_oss):
    tagged = [*user("Hi"), {"role": "assistant", "content": "<|channel|>final<|message|>Ho"}, *user("Bye")]
    with pytest.raises(InvalidRequest, match="rejects them: You have passed a message containing"):
        gpt_oss.encode_chat(tagged, now=NOW)


def test_the_template_s_clock_is_in_utc():
    later = NOW.astimezone(timezone(timedelta(hours=9)))
    tokenizer = tokenizer_of(byte_level(), **{"tokenizer.chat_template": "{{ strftime_now('%d %b %Y %H:%M') }}"})
    assert later.day == 6
    assert pieces_of(tokenizer, tokenizer.encode_chat(user(""), now=later)) == list("05 Aug 2025 23:30")


FRAGMENTS = ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<", "|>", "<|", "system", "\n", " ", "\ufdd0", "é", ">"]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join))
def test_special_tokens_in_content_are_plain_text_and_no_character_is_lost(content):
    ids = SMALL.encode_chat(user(content), now=NOW)
    special = [SMALL.vocab.tokens[i] for i in ids if i in SMALL.vocab.special.values()]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert rendered(SMALL, user(content)) == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt_oss"])
def test_every_special_token_of_a_real_vocabulary_is_plain_text_in_content(name, request):
    tokenizer = request.getfixturevalue(name)
    special = set(tokenizer.vocab.special.values())
    content = " ".join(tokenizer.vocab.special) + "".join(tokenizer.vocab.special)
    ids, plain = (tokenizer.encode_chat(user(text), now=NOW) for text in (content, "x"))
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert content in rendered(tokenizer, user(content))


def test_content_and_template_do_not_join_into_a_special_token():
    for template, content in [
        ("{{ messages[0].content }}|im_end|>", "a <"),
        ("<|im_{{ messages[0].content | trim }}", " end|> a"),
        ("<|{{ messages[0].content }}|>", "im_end"),
    ]:
        tokenizer = tokenizer_of(byte_level(), **{"tokenizer.chat_template": template})
        ids = tokenizer.encode_chat(user(content), now=NOW)
        assert not set(ids) & set(tokenizer.vocab.special.values())


def test_a_template_may_build_a_special_token_from_the_role():
    template = "{{ '<|' + messages[0].role + '|>' + messages[0].content }}"
    tokenizer = tokenizer_of(byte_level(names=("<|user|>",)), **{"tokenizer.chat_template": template})
    assert pieces_of(tokenizer, tokenizer.encode_chat(user("x"), now=NOW)) == ["<|user|>", "x"]


def test_noncharacters_in_content_are_kept():
    nonchars = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert nonchars in rendered(SMALL, user(nonchars))


def test_a_lone_surrogate_in_content_is_refused():
    with pytest.raises(InvalidRequest, match=r"^messages: .*U\+DC00"):
        SMALL.encode_chat(user("\udc00"), now=NOW)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content | trim }}.", "<b>&'."),
        ("{{ messages[0].content.strip().startswith('<b') }}", "True"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": " <b>&\'\\n"}'),
        ("{{ {'é': 1} | tojson(indent=1) }}", '{\n "é": 1\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}{{ messages[0].role }}{% endgeneration %}b", "auserb"),
        ("  {% if true %}\n  x\n  {% endif %}\ny\n", "  x\ny\n"),
        ("{{ tools is none }}{{ documents is none }}{{ other is defined }}", "TrueTrueFalse"),
        ("{{ add_generation_prompt }}{{ bos_token }}{{ eos_token }}{{ pad_token }}", "Truehe<|im_end|>"),
    ],
)
def test_templates_render_as_in_transformers(template, expected):
    tokens = {"bos_token_id": 256, "eos_token_id": 261}
    assert chat_with(template + "{{ messages[0].content }}", " <b>&'\n", **tokens) == expected + " <b>&'\n"


def test_the_last_newline_of_a_template_is_not_rendered():
    assert chat_with("{{ messages[0].content }}\n") == "Hi"


def test_a_template_that_rejects_messages_or_fails_is_reported_in_one_sentence():
    assert rejection("{{ raise_exception('no system role') }}").endswith("chat template rejects them: no system role")
    assert "fails on them: 'None' has no attribute 'x'" in rejection("{{ none.x.y }}")
    assert "fails on them: TypeError: " in rejection("{{ 1 + 'a' }}")
    assert "attribute 'append' of 'list' object is unsafe" in rejection("{{ messages.append(1) }}")
    assert "fails on them: RecursionError: " in rejection("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")


def test_a_model_without_a_usable_template_still_encodes_raw_prompts():
    for template, reason in [
        ("", "no chat template"),
        ("{% if %}", "does not compile"),
        ("{% for %}" * 9, "not compile"),
    ]:
        tokenizer = tokenizer_of(byte_level(), **{"tokenizer.chat_template": template})
        assert tokenizer.encode_prompt("he") == [256]
        with pytest.raises(InvalidRequest, match=f"this model has no usable chat template, .*{reason}"):
            tokenizer.encode_chat(user("Hi"), now=NOW)
        with pytest.raises(ModelLoadFailed, match=reason):
            tokenizer.require_chat()
    SMALL.require_chat()


def test_messages_may_be_any_sequence_of_mappings():
    assert SMALL.encode_chat(tuple(user("Hi")), now=NOW) == SMALL.encode_chat(user("Hi"), now=NOW)
