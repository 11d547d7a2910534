"""Jobs of a run and their reference answers, computed in this process without faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.tiny_models import make_tiny
from worker.config import EngineSection, ModelSection
from worker.echo import load_echo
from worker.jobs.protocol import Job
from worker.jobs.reader import History
from worker.runtime import LoadedModel, load
from worker.service.prepared_job import PreparedJob

POISON = (11, 7, 11, 7, 11, 13)
"""A prompt with this prefix ends the process of each worker that runs it; see `worker.py`."""
QUEUES = ("tiny", "echo")
TINY_CONTEXT, ECHO_CONTEXT = 512, 2048
PREFILL_CHUNK = 64


@dataclass(frozen=True)
class Case:
    """A job's fields, except its id, and its reference answer."""

    fields: Mapping[str, Any]
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    finish_reason: str
    stop_sequence: str | None

    @property
    def text(self) -> str:
        return "".join(self.texts)


def reference_case(served: LoadedModel, fields: Mapping[str, Any]) -> Case:
    """Compute the answer in this process, without server and service."""
    job = Job.parse({"job_id": "reference", **fields})
    answer = PreparedJob.of(job, served, "0-0", 0).answer(served, History())
    served.engine.add(answer.sequence)
    tokens = []
    while answer.finish_reason is None:
        tokens += [token for drawn in served.engine.step() if (token := answer.push(drawn))]
    served.engine.abort(answer.sequence.id)
    ids, texts = tuple(token.id for token in tokens), tuple(token.t for token in tokens)
    return Case(fields, ids, texts, answer.finish_reason, answer.stop_sequence)


def tiny_cases(folder: Path, seed: int, count: int) -> list[Case]:
    """Answers of a tiny llama with random prompts, temperatures, penalties and seeds."""
    random = Random(f"tiny {seed}")
    path = make_tiny("llama", folder / "tiny.gguf", quant="F32")
    served = load(
        path,
        ModelSection(context=TINY_CONTEXT),
        EngineSection(backend="cpu", prefill_chunk=PREFILL_CHUNK),
        _no_progress,
    )
    return [_with_stop(served, _tiny_fields(random), random) for _ in range(count)]


def echo_cases(seed: int, count: int) -> list[Case]:
    """Long answers of the echo model, which cost no computation."""
    random = Random(f"echo {seed}")
    served = load_echo(ECHO_CONTEXT, PREFILL_CHUNK, 0.0, _no_progress)
    cases = []
    for _ in range(count):
        prompt = "".join(random.choices("abcdefghij äöü€ 😀\n", k=random.randint(1, 90)))
        fields = {"prompt": prompt, "max_tokens": random.randint(1, 600), "seed": random.getrandbits(64)}
        cases.append(_with_stop(served, fields, random))
    return cases


def _tiny_fields(random: Random) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": random.randint(20, 300),
        "seed": random.getrandbits(64),
        "temperature": random.choice([0.0, 0.8, 1.0]),
        "top_p": random.choice([1.0, 0.95]),
        "repetition_penalty": random.choice([1.0, 1.1]),
        "ignore_eos": random.random() < 0.8,
        "logprobs": random.choice([None, None, 3]),
    }
    if random.random() < 0.5:
        fields["prompt"] = "".join(random.choices("abcdefghij äöü€", k=random.randint(1, 100)))
    else:
        fields["prompt_tokens"] = [random.randrange(5, 250) for _ in range(random.randint(1, 150))]
    return {name: value for name, value in fields.items() if value is not None}


def _with_stop(served: LoadedModel, fields: dict[str, Any], random: Random) -> Case:
    """The case; one in three has a stop string that occurs in its answer."""
    case = reference_case(served, fields)
    middle = len(case.text) // 2
    stop = case.text[middle : middle + 3]
    if not stop or random.random() > 0.3:
        return case
    return reference_case(served, {**fields, "stop": [stop]})


def _no_progress(done: int, total: int) -> None:
    """Ignore the progress of a load."""
