"""What is asked in a run, and the answers of an engine that nobody disturbs, computed beforehand in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.tiny_models import make_tiny
from worker.config import EngineSection, ModelSection
from worker.echo_model import load_echo
from worker.jobs.lease import History
from worker.jobs.protocol import Job
from worker.runtime import LoadedModel, load
from worker.service.question import Question

POISON = (11, 7, 11, 7, 11, 13)
"""A prompt that begins so ends the process of every worker that runs it; see `worker.py`."""
POOLS = ("tiny", "echo")
TINY_CONTEXT, ECHO_CONTEXT = 512, 2048
PREFILL_CHUNK = 64


@dataclass(frozen=True)
class Asked:
    """A job's fields, all but its id, and what an undisturbed run answers."""

    fields: Mapping[str, Any]
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    finish_reason: str
    stop_sequence: str | None

    @property
    def text(self) -> str:
        return "".join(self.texts)


def undisturbed(served: LoadedModel, fields: Mapping[str, Any]) -> Asked:
    """Answer a job in this process, with neither server nor service."""
    job = Job.parse({"job_id": "undisturbed", **fields})
    answer = Question.of(job, served, "0-0", 0).answer(served, History())
    served.engine.add(answer.sequence)
    tokens = []
    while answer.finish_reason is None:
        tokens += [token for drawn in served.engine.step() if (token := answer.push(drawn))]
    served.engine.abort(answer.sequence.id)
    ids, texts = tuple(token.id for token in tokens), tuple(token.t for token in tokens)
    return Asked(fields, ids, texts, answer.finish_reason, answer.stop_sequence)


def tiny_questions(folder: Path, seed: int, count: int) -> list[Asked]:
    """Sampled answers of a tiny llama: other prompts, temperatures, penalties and seeds each time."""
    random = Random(f"tiny {seed}")
    path = make_tiny("llama", folder / "tiny.gguf", quant="F32")
    served = load(
        path, ModelSection(context=TINY_CONTEXT), EngineSection(backend="cpu", prefill_chunk=PREFILL_CHUNK), _unheard
    )
    return [_with_stop(served, _tiny_fields(random), random) for _ in range(count)]


def echo_questions(seed: int, count: int) -> list[Asked]:
    """Long answers that cost nothing."""
    random = Random(f"echo {seed}")
    served = load_echo(ECHO_CONTEXT, PREFILL_CHUNK, 0.0, _unheard)
    asked = []
    for _ in range(count):
        prompt = "".join(random.choices("abcdefghij äöü€ 😀\n", k=random.randint(1, 90)))
        fields = {"prompt": prompt, "max_tokens": random.randint(1, 600), "seed": random.getrandbits(64)}
        asked.append(_with_stop(served, fields, random))
    return asked


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


def _with_stop(served: LoadedModel, fields: dict[str, Any], random: Random) -> Asked:
    """The question; one in three with a stop string that its answer meets, so that text is held back."""
    asked = undisturbed(served, fields)
    middle = len(asked.text) // 2
    stop = asked.text[middle : middle + 3]
    if not stop or random.random() > 0.3:
        return asked
    return undisturbed(served, {**fields, "stop": [stop]})


def _unheard(done: int, total: int) -> None:
    """Nobody watches this load."""
