"""A job's answer: prompt to ids, drawn ids to published tokens, and continuing published ids."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

import pytest

from tests.models import run
from tests.text.small import HARMONY_NAMES, USER_DEFINED, byte_level
from worker import runtime
from worker.answer import Answer, prompt_ids, tokenize_job
from worker.config import EngineSection, ModelSection
from worker.engine.engine import DrawnToken
from worker.errors import InvalidRequest
from worker.jobs.protocol import Job, Resolved
from worker.sampling import Draw
from worker.text.tokenizer import load_tokenizer

NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture(scope="module", params=["qwen2", "phi3", "gpt-oss"])
def loaded(request, tiny):
    return runtime.load(tiny(request.param), ModelSection(), EngineSection(backend="cpu"))


def answer(loaded, published=(), **fields):
    job = Job.parse({"job_id": "j", "prompt": "the quick", "seed": 5, "max_tokens": 24, **fields})
    prompt, resolved = tokenize_job(job, loaded, NOW, "1-1")
    return Answer(job, resolved, loaded.tokenizer, prompt, published)


def tokens_of(loaded, answered):
    published = []
    loaded.engine.add(answered.sequence)
    while answered.finish_reason is None:
        published += [token for drawn in loaded.engine.step() if (token := answered.push(drawn))]
    loaded.engine.abort(answered.sequence.id)
    return published


def test_joined_text_is_the_decoding_of_all_released_bytes(loaded):
    tokens = tokens_of(loaded, answer(loaded, ignore_eos=True, prompt_tokens=[5, 6, 7], prompt=None))
    released = b"".join(loaded.tokenizer.token_bytes(token.id) for token in tokens)
    assert "".join(token.t for token in tokens) == released.decode("utf-8", "replace")
    assert [token.i for token in tokens] == list(range(24))


def test_tokens_have_their_bytes_and_those_of_their_alternatives_if_the_job_asks_for_both(loaded):
    options = {"ignore_eos": True, "logprobs": 3, "token_bytes": True}
    with_bytes = tokens_of(loaded, answer(loaded, **options))
    assert b"".join(token.data for token in with_bytes).decode("utf-8", "replace") == "".join(t.t for t in with_bytes)
    for token in with_bytes:
        assert token.data == loaded.tokenizer.token_bytes(token.id)
        assert token.top_data == tuple(loaded.tokenizer.token_bytes(id) for id, _ in token.top)
    without = tokens_of(loaded, answer(loaded, **options | {"token_bytes": False}))
    assert without == [token._replace(data=None, top_data=None) for token in with_bytes]
    assert tokens_of(loaded, answer(loaded, ignore_eos=True, token_bytes=True))[0].data is None


def test_a_second_worker_publishes_what_the_first_would_have(loaded):
    whole = tokens_of(loaded, answer(loaded, temperature=0.8, ignore_eos=True))
    for cut in (1, 5, 23):
        published = [token.id for token in whole[:cut]]
        assert tokens_of(loaded, answer(loaded, published, temperature=0.8, ignore_eos=True)) == whole[cut:]


def test_published_ids_that_are_a_whole_answer_leave_nothing_to_run(loaded):
    whole = tokens_of(loaded, answer(loaded))
    done = answer(loaded, [token.id for token in whole])
    assert done.finish_reason in ("length", "stop")
    cut = answer(loaded, [token.id for token in whole[:-1]])
    assert cut.finish_reason is None


def test_a_stop_string_ends_the_answer_and_is_not_published(loaded):
    whole = tokens_of(loaded, answer(loaded, ignore_eos=True))
    text = "".join(token.t for token in whole)
    neighbours = [(a.t + b.t) for a, b in pairwise(whole) if a.t and b.t]
    stop = next(both for both in neighbours if text.count(both) == 1)
    stopped = answer(loaded, ignore_eos=True, stop=[stop])
    published = tokens_of(loaded, stopped)
    assert "".join(token.t for token in published) == text[: text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    resumed = answer(loaded, [token.id for token in published], ignore_eos=True, stop=[stop])
    assert (resumed.finish_reason, resumed.stop_sequence) == ("stop_sequence", stop)


def test_a_stop_string_that_is_a_control_token_s_name_ends_the_answer_there(loaded):
    vocab = loaded.tokenizer.vocab
    for name in [min(set(vocab.special) - {vocab.tokens[i] for i in vocab.end_ids}), vocab.tokens[min(vocab.end_ids)]]:
        always = {"temperature": 0, "logit_bias": {vocab.special[name]: 100}}
        stopped = answer(loaded, stop=["zz", name], **always)
        assert [(token.id, token.t) for token in tokens_of(loaded, stopped)] == [(vocab.special[name], "")]
        assert (stopped.finish_reason, stopped.stop_sequence) == ("stop_sequence", name)
        resumed = answer(loaded, [vocab.special[name]], stop=["zz", name], **always)
        assert (resumed.finish_reason, resumed.stop_sequence) == ("stop_sequence", name)
    later = answer(loaded, stop=[name], min_tokens=3, ignore_eos=True, temperature=0)
    tokens_of(loaded, later)
    assert later.finish_reason == "length"


def test_a_control_stop_string_matches_only_after_min_tokens(loaded):
    name = min(
        set(loaded.tokenizer.vocab.special) - {loaded.tokenizer.vocab.tokens[i] for i in loaded.tokenizer.vocab.end_ids}
    )
    bias = {loaded.tokenizer.vocab.special[name]: 100}
    stopped = answer(loaded, stop=[name], min_tokens=3, temperature=0, logit_bias=bias)
    assert len(tokens_of(loaded, stopped)) == 4
    assert (stopped.finish_reason, stopped.stop_sequence) == ("stop_sequence", name)


def test_a_stop_token_ends_the_answer_without_text_and_releases_withheld_text(loaded):
    whole = tokens_of(loaded, answer(loaded, ignore_eos=True, temperature=0))
    at = next(i for i, token in enumerate(whole) if i > 1 and token.t and token.id not in {t.id for t in whole[:i]})
    stops = {"stop_token_ids": [whole[at].id], "stop": [whole[at - 1].t + "zz"] if whole[at - 1].t else []}
    for ignore_eos in (True, False):
        stopped = answer(loaded, ignore_eos=ignore_eos, temperature=0, **stops)
        published = tokens_of(loaded, stopped)
        if ignore_eos or not {t.id for t in whole[:at]} & loaded.tokenizer.vocab.end_ids:
            assert [token.id for token in published] == [token.id for token in whole[: at + 1]]
            released = b"".join(loaded.tokenizer.token_bytes(token.id) for token in whole[:at])
            assert "".join(token.t for token in published) == released.decode("utf-8", "replace")
            assert (stopped.finish_reason, stopped.stop_sequence) == ("stop", None)
            resumed = answer(loaded, [token.id for token in published], ignore_eos=ignore_eos, temperature=0, **stops)
            assert resumed.finish_reason == "stop"


def test_no_stop_or_end_token_is_drawn_before_min_tokens(loaded):
    stop, end = 40, min(loaded.tokenizer.vocab.end_ids)
    biased = {"temperature": 0, "logit_bias": {stop: 100, end: 90}, "min_tokens": 5, "ignore_eos": True}
    stopped = answer(loaded, stop_token_ids=[stop], **biased)
    ids = [token.id for token in tokens_of(loaded, stopped)]
    assert (len(ids), ids[5], stopped.finish_reason) == (6, stop, "stop")
    assert not {stop, end} & set(ids[:5])
    for cut in (1, 4, 5):
        assert [
            token.id for token in tokens_of(loaded, answer(loaded, ids[:cut], stop_token_ids=[stop], **biased))
        ] == ids[cut:]


def test_a_stop_token_outside_the_vocabulary_is_refused(loaded):
    rows = loaded.vocab_size
    with pytest.raises(InvalidRequest, match=rf"stop_token_ids\.1: below {rows}, the size of the vocabulary"):
        answer(loaded, stop_token_ids=[0, rows])


def test_tokens_after_the_end_are_dropped(loaded):
    answered = answer(loaded, max_tokens=2)
    drawn = run(loaded.engine, answered.sequence)["j"]
    assert [answered.push(token) is not None for token in [*drawn, drawn[-1]]] == [True, True, False]


THINKING = byte_level(extra=[(mark, USER_DEFINED) for mark in ("<think>", "</think>", "<tool_call>", "</tool_call>")])
HARMONY = byte_level(names=HARMONY_NAMES)
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALLS = '<tool_call>{"name": "f", "arguments": {"é": 1}}</tool_call>'
HEADERS = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.f<|channel|>commentary<|message|>{}"
REJECTED = '<tool_call>{"name": "f"'


@pytest.mark.parametrize(
    ("metadata", "prompt", "text"),
    [
        (THINKING, "<|im_start|>assistant\n<think>\n", f"h🙂\n</think>\n\nhe\n{CALLS}\n{CALLS}\nhe"),
        (THINKING, "<|im_start|>assistant\n", f"<think>\n\n</think>\n\n{REJECTED}<think>"),
        (HARMONY, "<|start|>assistant", f"{HEADERS}<|call|>"),
        (HARMONY, "<|start|>assistant", "<|channel|>analysis Well, no<|return|>"),
    ],
)
def test_replayed_tokens_leave_the_parsers_in_the_same_state(metadata, prompt, text):
    tokenizer = load_tokenizer(metadata)
    messages = [{"role": "user", "content": "hi"}]
    job = Job.parse({"job_id": "j", "messages": messages, "tools": TOOLS, "stop": ["}}}", "hm?"]})
    ids, resolved = tokenizer.encode(prompt, special=True), Resolved("m", 5, max_tokens=999, seed=1)
    drawn = [DrawnToken("j", n, Draw(i), False, None) for n, i in enumerate(tokenizer.encode(text, special=True))]
    whole = Answer(job, resolved, tokenizer, ids)
    tokens = [whole.push(token) for token in drawn]
    assert len({token.channel for token in tokens}) > 1 or "Well" in text
    for cut in range(len(drawn)):
        resumed = Answer(job, resolved, tokenizer, ids, [token.draw.id for token in drawn[:cut]])
        assert [resumed.push(token) for token in drawn[cut:]] == tokens[cut:]


def test_calls_are_text_for_a_job_without_tools_or_with_tool_choice_none():
    tokenizer = load_tokenizer(THINKING)
    resolved = Resolved("m", 5, max_tokens=999, seed=1)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        job = Job.parse({"job_id": "j", "messages": [{"role": "user", "content": "hi"}], **fields})
        answered = Answer(job, resolved, tokenizer, prompt_ids(job, tokenizer, NOW))
        ids = tokenizer.encode(CALLS)
        tokens = [answered.push(DrawnToken("j", n, Draw(i), False, None)) for n, i in enumerate(ids)]
        assert "".join(token.t for token in tokens) == CALLS
        assert {token.channel for token in tokens} == {"final"}


def test_a_chat_that_its_template_rejects_is_an_invalid_request(loaded):
    with pytest.raises(InvalidRequest):
        answer(loaded, prompt=None, messages=[{"role": "user", "content": "\ud800"}])
