"""How an answer is shown: text and figures for people, a JSON object a line for programs.

Both hear of an answer in the order started, token…, ended or failed. They know no engine and no server.
"""

from __future__ import annotations

import sys

from worker.cli.console import print_json
from worker.errors import WorkerError
from worker.jobs.events import End, ErrorEvent, Token
from worker.jobs.protocol import Resolved


class Terminal:
    """For people: the text on stdout, figures on stderr."""

    def started(self, resolved: Resolved) -> None:
        """Nothing to say yet."""

    def token(self, token: Token) -> None:
        """The token's text."""
        sys.stdout.write(token.t)
        sys.stdout.flush()

    def ended(self, end: End) -> None:
        """How it went."""
        sys.stdout.write("\n")
        sys.stdout.flush()
        rate = f", {(end.tokens_out - 1) / end.decode_ms * 1000:.1f} tokens/s" if end.tokens_out > 1 else ""
        print(
            f"[{end.finish_reason}: {end.prompt_tokens} prompt tokens, {end.tokens_out} drawn, "
            f"the first after {end.ttft_ms:.0f} ms{rate}]",
            file=sys.stderr,
        )

    def failed(self, error: WorkerError) -> None:
        """One sentence."""
        print(f"worker: {error.code}: {error.message}", file=sys.stderr)


class JsonLines:
    """For programs: one event a line; the last is `end` or `error`."""

    def started(self, resolved: Resolved) -> None:
        """What was resolved, the seed among it."""
        print_json(
            {
                "event": "started",
                "model": resolved.model,
                "seed": resolved.seed,
                "max_tokens": resolved.max_tokens,
                "prompt_tokens": resolved.prompt_len,
            }
        )

    def token(self, token: Token) -> None:
        """Index, id, text, and where asked for log-probabilities."""
        print_json({"event": "token", **token.to_fields()})

    def ended(self, end: End) -> None:
        """Why and how fast."""
        print_json({"event": End.kind, **end.to_fields()})

    def failed(self, error: WorkerError) -> None:
        """The same error event that a job's stream would get."""
        print_json({"event": ErrorEvent.kind, **ErrorEvent.of(error).to_fields()})
