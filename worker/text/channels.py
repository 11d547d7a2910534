"""Harmony, gpt-oss's message format: which tokens are a message's header, and which channel its content is on.

A message reads `<|start|>role<|channel|>name …<|message|>content<|end|>` (OpenAI's harmony guide). Followed by token
ids; knows nothing of text but a channel's name. Read next: text_stream.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from worker.text.vocabulary import Vocabulary

_HEADER = ("<|start|>", "<|channel|>", "<|message|>")
_NAMES = ("analysis", "commentary", "final")


class Channels:
    """Where in a harmony conversation the next token falls."""

    def __init__(self, special: dict[str, int], token_bytes: Callable[[int], bytes]) -> None:
        self.channel: str | None = None
        """The channel of the message whose content comes next."""
        self._token_bytes = token_bytes
        self._start, self._channel, self._message = (special[name] for name in _HEADER)
        self._ends = frozenset(special[name] for name in ("<|end|>", "<|return|>", "<|call|>") if name in special)
        self.edges = self._ends | {self._start, self._channel}
        """The tokens at which a message's content ends."""
        self._in_header = False
        self._name: bytes | None = None

    @staticmethod
    def known_to(vocab: Vocabulary) -> bool:
        """Whether this vocabulary speaks harmony."""
        return all(name in vocab.special for name in _HEADER)

    def follow(self, prompt_ids: Sequence[int]) -> None:
        """Go through a prompt; nothing before its last `<|start|>` matters."""
        ids = list(prompt_ids)
        first = len(ids) - 1 - ids[::-1].index(self._start) if self._start in ids else 0
        for token_id in ids[first:]:
            self.advance(token_id)

    def advance(self, token_id: int) -> bool:
        """Take the next token; return whether it belongs to a header, which is not shown."""
        if token_id in self.edges:
            self._in_header = token_id not in self._ends
            self._name = b"" if token_id == self._channel else None
            self.channel = None
            return self._in_header
        if not self._in_header:
            return False
        if token_id == self._message:
            self._in_header = False
            self.channel = self._named()
        elif self._name is not None:
            self._name += self._token_bytes(token_id)
        return True

    def _named(self) -> str | None:
        words = (self._name or b"").decode(errors="replace").split()
        return words[0] if words and words[0] in _NAMES else None
