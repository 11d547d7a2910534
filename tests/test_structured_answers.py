"""Answers with a grammar from an engine: valid, and the same ids alone, beside others, and when continued."""

from __future__ import annotations

import json
import random
import re
from datetime import UTC, datetime
from typing import Any

import jsonschema
import pytest

from tests.text.random_schemas import hoisted, random_schema
from worker import runtime
from worker.answer import Answer, job_grammar, tokenize_job
from worker.config import EngineSection, ModelSection
from worker.engine import FailedSequence
from worker.errors import InvalidRequest
from worker.jobs.protocol import Job

JOBS = 200
"""Random schemas, each with its own seed and temperature."""
NOW = datetime(2026, 3, 1, tzinfo=UTC)
TEMPERATURES = (0, 0.3, 1.0, 2.0)


def load(tiny, name, running=1):
    return runtime.load(tiny(name), ModelSection(), EngineSection(backend="cpu", max_running=running))


@pytest.fixture(scope="module", params=["qwen2", "phi3"])
def models(request, tiny):
    """A model that runs one sequence, and the same one with three at a time."""
    return load(tiny, request.param), load(tiny, request.param, running=3)


def answer(loaded: Any, published: Any = (), **fields: Any) -> Answer:
    job = Job.parse({"job_id": "j", "prompt": "the quick", "max_tokens": 60, **fields})
    prompt, resolved = tokenize_job(job, loaded, NOW, "1-1")
    grammar = job_grammar(job, loaded.tokenizer, prompt)
    return Answer(job, resolved, loaded.tokenizer, prompt, published, grammar)


def run(loaded: Any, *answers: Answer) -> list[list[Any]]:
    """The published tokens of answers that run at the same time. Raises the error of one that fails."""
    published: dict[str, list[Any]] = {}
    for number, each in enumerate(answers):
        each.sequence.id = f"s{number}"
        published[each.sequence.id] = []
        loaded.engine.add(each.sequence)
    by_id = {each.sequence.id: each for each in answers}
    while not loaded.engine.idle:
        for drawn in loaded.engine.step():
            if isinstance(drawn, FailedSequence):
                raise drawn.error
            each = by_id[drawn.sequence_id]
            if token := each.push(drawn):
                published[each.sequence.id].append(token)
    assert all(each.finish_reason for each in answers)
    return list(published.values())


def random_jobs(count: int) -> list[dict[str, Any]]:
    rng, jobs = random.Random(5), []
    for number in range(count):
        schema = hoisted(random_schema(rng, 2))
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        jobs.append({"response_format": form, "seed": number, "temperature": TEMPERATURES[number % 4]})
    return jobs


def test_ids_are_the_same_alone_beside_others_and_continued(models):
    single, several = models
    finished = 0
    jobs = random_jobs(JOBS // 2)
    for at in range(0, len(jobs), 5):
        group = jobs[at : at + 5]
        alone = [run(single, answer(single, **fields))[0] for fields in group]
        assert run(several, *(answer(several, **fields) for fields in group)) == alone
        for number, (fields, whole) in enumerate(zip(group, alone, strict=True)):
            cut = (at + 7 * number) % len(whole)
            continued = answer(single, [token.id for token in whole[:cut]], **fields)
            assert run(single, continued)[0] == whole[cut:]
            if continued.finish_reason == "stop":
                finished += 1
                instance = json.loads("".join(token.t for token in whole))
                jsonschema.validate(instance, fields["response_format"]["json_schema"]["schema"])
    assert finished > len(jobs) // 3


FORMS = [
    ({"type": "regex", "regex": r"(he|ll)+o \d{1,3}"}, r"(he|ll)+o \d{1,3}"),
    ({"type": "choice", "choice": ["yes", "no", "日本"]}, "yes|no|日本"),
    ({"type": "grammar", "grammar": 'start: "<" /[a-c]{1,4}/ ">"'}, "<[a-c]{1,4}>"),
]


@pytest.mark.parametrize(("form", "pattern"), FORMS)
def test_a_finished_answer_is_of_its_form(models, form, pattern):
    texts = set()
    for seed in range(12):
        ours = answer(models[0], response_format=form, seed=seed, max_tokens=40)
        text = "".join(token.t for token in run(models[0], ours)[0])
        if ours.finish_reason == "stop":
            assert re.fullmatch(pattern, text), text
            texts.add(text)
    assert len(texts) > 1


def test_an_answer_that_is_cut_off_begins_like_one_of_its_form(models):
    form = {"type": "regex", "regex": "(abc){20}"}
    cut_off = answer(models[0], response_format=form, max_tokens=7)
    tokens = run(models[0], cut_off)[0]
    assert cut_off.finish_reason == "length"
    assert ("abc" * 20).startswith("".join(token.t for token in tokens))


def test_min_tokens_beyond_the_end_of_the_grammar_is_an_error(models):
    form = {"type": "choice", "choice": ["yes"]}
    with pytest.raises(InvalidRequest, match="min_tokens"):
        run(models[0], answer(models[0], response_format=form, min_tokens=30))
    assert "".join(t.t for t in run(models[0], answer(models[0], response_format=form, min_tokens=2))[0]) == "yes"


def test_biases_penalties_and_stop_strings_apply_within_the_grammar(models):
    loaded = models[0]
    form = {"type": "regex", "regex": "[ab]{1,30}!"}
    a, b = (loaded.tokenizer.word_encoder(letter)[0] for letter in "ab")
    text = "".join(t.t for t in run(loaded, answer(loaded, response_format=form, logit_bias={a: -100}))[0])
    assert set(text) <= {"b", "!"}
    text = "".join(t.t for t in run(loaded, answer(loaded, response_format=form, logit_bias={b: 90}, stop=["bbb"]))[0])
    assert text == ""


def test_log_probabilities_are_those_of_all_rows_without_the_mask(models):
    loaded = models[0]
    free = run(loaded, answer(loaded, logprobs=3, max_tokens=1))[0][0]
    bound = run(loaded, answer(loaded, logprobs=3, max_tokens=1, response_format={"type": "choice", "choice": ["x"]}))[
        0
    ][0]
    assert bound.top == free.top
    assert bound.t == "x"


def test_an_invalid_schema_is_refused_when_the_job_is_prepared(models):
    form = {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(
        InvalidRequest, match=r"response_format\.json_schema\.schema\.properties\.a\.not: not supported"
    ):
        answer(models[0], response_format=form)


def test_text_is_free_and_a_json_object_is_any_object(models):
    assert answer(models[0], response_format={"type": "text"}).sequence.sampling.grammar is None
    ours = answer(models[0], response_format={"type": "json_object"}, temperature=2, seed=3, max_tokens=5)
    assert "".join(token.t for token in run(models[0], ours)[0]).startswith("{")


def test_reasoning_in_harmony_is_free_and_its_final_message_follows_the_schema(tiny):
    loaded = load(tiny, "gpt-oss")
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": [[1], [2]]}}}
    special = loaded.tokenizer.vocab.special
    messages = [{"role": "user", "content": "hi"}]
    channels = set()
    for seed in range(10):
        # A random model does not end its reasoning.
        ours = answer(loaded, prompt=None, messages=messages, response_format=form, seed=seed, max_tokens=400,
                      logit_bias={special["<|end|>"]: 5, special["<|message|>"]: 5})  # fmt: skip
        texts: dict[str, str] = {}
        for token in run(loaded, ours)[0]:
            texts[token.channel] = texts.get(token.channel, "") + token.t
        channels |= set(texts)
        if ours.finish_reason == "stop":
            assert json.loads(texts["final"]) in ([1], [2])
    assert channels == {"reasoning", "final"}
