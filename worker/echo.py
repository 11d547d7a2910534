"""The simple side of the model seam: a Runner that says its prompt again, over and over, and computes nothing.

It measures what everything around a model costs, and gives tests answers that are known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

from worker.model import OnLaunched
from worker.ops import Batch
from worker.sampling import Draw, DrawRequest


class EchoRunner:
    """The token of index i is the prompt's token i modulo its length; sampling parameters change nothing."""

    def __init__(self, vocab_size: int, kv_blocks: int) -> None:
        self.vocab_size = vocab_size
        self.kv_blocks = kv_blocks

    def run(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched = lambda: None) -> list[Draw]:
        """See `Runner.run`."""
        on_launched()
        return [_echo(request) for request in requests]


def _echo(request: DrawRequest) -> Draw:
    if request.forced is not None:
        return Draw(request.forced)
    token = request.prompt[request.index % len(request.prompt)]
    if request.sampling.logprobs is None:
        return Draw(token)
    return Draw(token, 0.0, ((token, 0.0),)[: request.sampling.logprobs])
