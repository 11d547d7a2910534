"""A job's answer: prompt to ids, drawn ids to published tokens, and continuing published ids."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

import pytest

from tests.models import run
from worker import runtime
from worker.answer import Answer, tokenize_job
from worker.config import EngineSection, ModelSection
from worker.errors import InvalidRequest
from worker.jobs.protocol import Job

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


def test_tokens_after_the_end_are_dropped(loaded):
    answered = answer(loaded, max_tokens=2)
    drawn = run(loaded.engine, answered.sequence)["j"]
    assert [answered.push(token) is not None for token in [*drawn, drawn[-1]]] == [True, True, False]


def test_a_chat_that_its_template_rejects_is_an_invalid_request(loaded):
    with pytest.raises(InvalidRequest):
        answer(loaded, prompt=None, messages=[{"role": "user", "content": "\ud800"}])
