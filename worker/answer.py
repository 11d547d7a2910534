"""One job's answer: prompt to token ids before the engine, drawn ids to published tokens after it.

No clock, server or device: everything about token i is a function of the job, its resolved
parameters and the ids before i, so a second worker that gets the published ids continues exactly.
Callers are `worker/service/generation.py` and `worker generate`. `job_grammar` compiles what the
answer has to follow (`worker/text/answer_grammar.py`). Stop strings are matched, and text
withheld for them, in `worker/text/detokenizer.py`; channels are assigned in `worker/text/parsers/`.
"""

import hashlib
from collections.abc import Sequence as Ids
from dataclasses import fields
from datetime import datetime
from itertools import pairwise
from typing import Any

from worker import engine
from worker.jobs.chat import ToolChoice
from worker.jobs.events import Channel, Token
from worker.jobs.protocol import Job, Limits, Resolved
from worker.jobs.response_format import (
    ChoiceFormat,
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    ResponseFormat,
)
from worker.runtime import LoadedModel
from worker.sampling import FinishReason, Grammar, Sampling
from worker.text.answer_grammar import ContentFormat, answer_grammar
from worker.text.detokenizer import DetokenizedToken, IncrementalDetokenizer
from worker.text.parsers import answer_parser
from worker.text.tokenizer import Tokenizer


def prompt_ids(job: Job, tokenizer: Tokenizer, enqueued: datetime) -> list[int]:
    """The job's prompt as token ids. Raises InvalidRequest, e.g. if the chat template fails."""
    if job.prompt_tokens is not None:
        return list(job.prompt_tokens)
    if job.messages is not None:
        return tokenizer.encode_chat(
            [message.model_dump(exclude_none=True) for message in job.messages],
            now=enqueued,
            tools=job.tools,
            tool_choice=_tool_choice(job),
            kwargs=job.chat_template_kwargs,
        )
    return tokenizer.encode_prompt(job.prompt or "", special=job.special)


def tokenize_job(job: Job, model: LoadedModel, enqueued: datetime, entry_id: str) -> tuple[list[int], Resolved]:
    """The prompt as token ids, and the parameters resolved for the model. Raises InvalidRequest."""
    prompt = prompt_ids(job, model.tokenizer, enqueued)
    limits = Limits(model.name, model.vocab_size, model.engine.context)
    return prompt, job.resolve(limits, len(prompt), entry_id)


def job_grammar(job: Job, tokenizer: Tokenizer, prompt: Ids[int]) -> Grammar | None:
    """Compile what the job requires of its answer's text; None if that is free.

    The first call for a model takes about a second, others some milliseconds or, for a grammar that
    was compiled before, microseconds. Raises InvalidRequest for what can't be enforced.
    """
    content = _content_format(job.response_format)
    if content is None and not job.tools:
        return None
    choice = _tool_choice(job)
    return answer_grammar(tokenizer, prompt, content, job.tools, choice, ignore_eos=job.ignore_eos)


class Answer:
    """One job's answer. Add `sequence` to the engine; pass each token that it draws to `push`."""

    def __init__(
        self,
        job: Job,
        resolved: Resolved,
        tokenizer: Tokenizer,
        prompt: Ids[int],
        published: Ids[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_sequence: str | None = None
        """The stop string that ended the answer."""
        self.stop_token: int | None = None
        """The one of the job's `stop_token_ids` that ended the answer."""
        sampling, vocab = _sampling(job, resolved, grammar), tokenizer.vocab
        self.sequence = engine.Sequence(
            job.job_id,
            list(prompt),
            resolved.max_tokens,
            sampling,
            vocab.end_ids,
            list(published),
            job.priority,
            job.tenant or "",
        )
        # Control tokens have no text in which the detokenizer would find these stop strings.
        self._stop_tokens = {vocab.control_id(stop): stop for stop in job.stop or ()}
        self._token_bytes = tokenizer.token_bytes if job.token_bytes and job.logprobs is not None else None
        self.stops_at_text = bool(job.stop)
        """Whether a stop string may end the answer: the engine does not know these ends."""
        tools = None if job.tool_choice == "none" else job.tools
        structured = _content_format(job.response_format) is not None
        parser = answer_parser(tokenizer, prompt, tools, structured=structured)
        self._text = IncrementalDetokenizer(
            tokenizer,
            stop=job.stop or (),
            min_tokens=job.min_tokens,
            parser=parser,
            silent_ids=sampling.stop_token_ids,
        )
        for index, token_id in enumerate(published):
            self._release(index, token_id)

    def push(self, token: engine.DrawnToken) -> Token | None:
        """The token to publish, or None if it is a replayed one or follows the answer's end."""
        _, index, draw, replayed, _ = token
        if replayed or self.finish_reason:
            return None
        token_id, logprob, top = draw
        place: tuple[Channel, str | None, int | None] = ("final", None, None)
        if self._text.is_plain:  # half of the time of the general case
            self.finish_reason = self.sequence.finish_at(index, token_id)
            text = self._text.decode(token_id, last=self.finish_reason is not None)
            self._note_stop(token_id)
        else:
            text, place, _ = self._release(index, token_id)
        data = top_data = None
        if self._token_bytes is not None:
            data, top_data = self._token_bytes(token_id), tuple(self._token_bytes(each) for each, _ in top or ())
        # A third of the time of a call of the class.
        return tuple.__new__(Token, (index, token_id, text, logprob, top, *place, data, top_data))

    def _release(self, index: int, token_id: int) -> DetokenizedToken:
        """The text of a token. Sets the finish reason; a stop string takes priority."""
        finish = self.sequence.finish_at(index, token_id)
        stop = self._stop_tokens.get(token_id) if index >= self.sequence.sampling.min_tokens else None
        piece = self._text.push(token_id, last=finish is not None or stop is not None)
        self.stop_sequence = stop if piece.stop is None else piece.stop
        self.finish_reason = finish if self.stop_sequence is None else "stop_sequence"
        self._note_stop(token_id)
        return piece

    def _note_stop(self, token_id: int) -> None:
        """Set `stop_token` if the answer has ended with this token and the job names it."""
        if self.finish_reason == "stop" and token_id in self.sequence.sampling.stop_token_ids:
            self.stop_token = token_id


class AttemptStats:
    """Times (`time.monotonic`) and counts of one attempt's tokens, and a digest of its text."""

    def __init__(self, claimed: float) -> None:
        self.tokens = 0
        """Drawn by this attempt, without the replayed tokens."""
        self.chars = 0
        self._claimed = self._first = self._newest = claimed
        self.text_digest = hashlib.sha256()
        """SHA-256 of the text that this attempt released."""

    @property
    def ttft_s(self) -> float:
        """Seconds from the claim to this attempt's first token."""
        return self._first - self._claimed

    @property
    def decode_s(self) -> float:
        """Seconds from this attempt's first token to the newest."""
        return self._newest - self._first

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second after the first."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else 0.0

    def count(self, text: str, times: Ids[float]) -> list[float]:
        """Count tokens drawn at `times`, which have that text together.

        Returns the seconds between each of them and its predecessor; the first token has none.
        """
        if not self.tokens:
            self._first = times[0]
            between = [later - earlier for earlier, later in pairwise(times)]
        else:
            between = [later - earlier for earlier, later in pairwise((self._newest, *times))]
        self._newest = times[-1]
        self.tokens += len(times)
        self.chars += len(text)
        self.text_digest.update(text.encode())
        return between


def _tool_choice(job: Job) -> Any:
    choice = job.tool_choice
    return choice.model_dump() if isinstance(choice, ToolChoice) else choice


def _content_format(given: ResponseFormat | None) -> ContentFormat | None:
    match given:
        case JsonObjectFormat():
            return ContentFormat("json_schema", {"type": "object"})
        case JsonSchemaFormat():
            return ContentFormat("json_schema", given.json_schema.schema_)
        case RegexFormat():
            return ContentFormat("regex", given.regex)
        case ChoiceFormat():
            return ContentFormat("choice", given.choice)
        case GrammarFormat():
            return ContentFormat("grammar", given.grammar)
        case _:
            return None


def _sampling(job: Job, resolved: Resolved, grammar: Grammar | None) -> Sampling:
    """The sampling parameters of the job, which has every field of `Sampling` but one by name."""
    values = {field.name: getattr(job, field.name) for field in fields(Sampling) if field.name != "grammar"}
    values |= {"logit_bias": dict(job.logit_bias or {}), "stop_token_ids": frozenset(job.stop_token_ids or ())}
    return Sampling(**values | {"seed": resolved.seed, "grammar": grammar})
