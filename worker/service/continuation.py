"""Jobs that another worker began and whose answers this worker can't continue.

| the published tokens | what this worker does |
| --- | --- |
| are the whole answer | adds the terminal event |
| are a part, and another living worker can continue | gives the entry back |
| are a part, and no other worker can | ends the job with INVALID_REQUEST |
"""

import re
from collections.abc import Mapping
from datetime import datetime

from worker.answer import Answer, prompt_ids
from worker.errors import InvalidRequest
from worker.jobs.events import End, Started
from worker.jobs.protocol import Job, Resolved
from worker.jobs.reader import History
from worker.runtime import LoadedModel


class CannotContinue(Exception):
    """This worker's model or context does not suffice for what `history` began."""

    def __init__(self, error: InvalidRequest, history: History) -> None:
        super().__init__(error.message)
        self.error = error
        """Ends the job if no other worker can continue it."""
        self.history = history


def can_continue(status: Mapping[str, str], started: Started) -> bool:
    """Whether a worker with this status in the registry has the model and the context."""
    same = status.get("model") == started.model or status.get("fingerprint") == started.fingerprint
    context = status.get("context", "")
    has_room = re.fullmatch("[0-9]{1,18}", context) and started.prompt_tokens + started.max_tokens <= int(context)
    return same and status.get("state") in ("ready", "busy") and bool(has_room)


def end_of(job: Job, model: LoadedModel, history: History, enqueued: datetime) -> End | None:
    """The `end` of an answer whose tokens are all published; None if some are missing."""
    started = history.started
    if started is None or any(not 0 <= token.id < model.vocab_size for token in history.tokens):
        return None
    try:
        prompt = prompt_ids(job, model.tokenizer, enqueued)
    except InvalidRequest:
        return None
    resolved = Resolved(started.model, started.prompt_tokens, started.max_tokens, started.seed)
    answer = Answer(job, resolved, model.tokenizer, prompt, [token.id for token in history.tokens])
    if answer.finish_reason is None:
        return None
    return End(
        finish_reason=answer.finish_reason,
        tokens_out=len(history.tokens),
        prompt_tokens=started.prompt_tokens,
        ttft_ms=0.0,
        decode_ms=0.0,
        stop_sequence=answer.stop_sequence,
        stop_token=answer.stop_token,
    )
