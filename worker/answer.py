"""A job's answer in the making: prompt to ids before the engine, ids to published tokens after it.

What joins jobs, text and engine, without a clock, a server or a device: everything about token i follows from the job,
what was resolved for it and the ids before i. So a second worker that is given the published ids goes on where the
first one was. `worker/service.py` and `worker generate` both drive it.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from datetime import datetime

from worker import engine
from worker.jobs.events import FinishReason, Token
from worker.jobs.protocol import Job, Resolved
from worker.sampling import Sampling
from worker.text.text_stream import TextStream
from worker.text.tokenizer import Tokenizer


def prompt_ids(job: Job, tokenizer: Tokenizer, enqueued: datetime) -> list[int]:
    """The job's prompt as token ids. Raises InvalidRequest, among others for a chat without a usable template."""
    if job.prompt_tokens is not None:
        return list(job.prompt_tokens)
    if job.messages is not None:
        return tokenizer.encode_chat([message.model_dump() for message in job.messages], now=enqueued)
    return tokenizer.encode_prompt(job.prompt or "", special=job.special)


class Answer:
    """One job's answer. `sequence` goes to the engine; every token that comes back goes through `push`."""

    def __init__(
        self, job: Job, resolved: Resolved, tokenizer: Tokenizer, prompt: Ids[int], published: Ids[int] = ()
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_sequence: str | None = None
        """Which stop string ended the answer."""
        self.sequence = engine.Sequence(
            job.job_id,
            list(prompt),
            resolved.max_tokens,
            _sampling(job, resolved),
            tokenizer.vocab.end_ids,
            list(published),
        )
        self._text = TextStream(tokenizer, stop=job.stop or (), min_tokens=job.min_tokens, prompt_ids=prompt)
        for index, token_id in enumerate(published):
            self._release(index, token_id)

    def push(self, token: engine.Token) -> Token | None:
        """The token as it is published, or None if it was published before or comes after the answer's end."""
        if token.replayed or self.finish_reason:
            return None
        text, channel = self._release(token.index, token.draw.id)
        return Token(token.index, token.draw.id, text, token.draw.logprob, token.draw.top, channel)

    def _release(self, index: int, token_id: int) -> tuple[str, str | None]:
        """The text and channel of token `index`; sets what ends the answer, a stop string before anything else."""
        finish = self.sequence.finish_at(index, token_id)
        piece = self._text.push(token_id, last=finish is not None)
        self.stop_sequence = piece.stop
        self.finish_reason = "stop_sequence" if piece.stop is not None else finish
        return piece.text, piece.channel


def _sampling(job: Job, resolved: Resolved) -> Sampling:
    return Sampling(
        temperature=job.temperature,
        top_k=job.top_k,
        top_p=job.top_p,
        min_p=job.min_p,
        repetition_penalty=job.repetition_penalty,
        frequency_penalty=job.frequency_penalty,
        presence_penalty=job.presence_penalty,
        penalize_prompt=job.penalize_prompt,
        logit_bias=dict(job.logit_bias or {}),
        seed=resolved.seed,
        min_tokens=job.min_tokens,
        ignore_eos=job.ignore_eos,
        logprobs=job.logprobs,
    )
