"""Harmony, gpt-oss's message format: which tokens form a message's header, and which channel its
content is on.

A message is `<|start|>role<|channel|>name …<|message|>content<|end|>` (OpenAI's harmony guide). The
state advances by token id; text is only decoded for a channel's name. Used by detokenizer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from worker.text.vocabulary import Vocabulary

_HEADER = ("<|start|>", "<|channel|>", "<|message|>")
_NAMES = ("analysis", "commentary", "final")


class Channels:
    """The state of a harmony conversation at the next token."""

    def __init__(self, special: dict[str, int], token_bytes: Callable[[int], bytes]) -> None:
        self.channel: str | None = None
        """The channel of the message whose content comes next."""
        self._token_bytes = token_bytes
        self._start, self._channel, self._message = (special[name] for name in _HEADER)
        self._ends = frozenset(special[name] for name in ("<|end|>", "<|return|>", "<|call|>") if name in special)
        self.boundaries = self._ends | {self._start, self._channel}
        """The tokens at which a message's content ends."""
        self._in_header = False
        self._name: bytes | None = None

    @staticmethod
    def supported_by(vocab: Vocabulary) -> bool:
        """Whether the vocabulary has the tokens of a harmony header."""
        return all(name in vocab.special for name in _HEADER)

    def follow(self, prompt_ids: Sequence[int]) -> None:
        """Advance through a prompt, from its last `<|start|>` on.

        Earlier tokens cannot change the state.
        """
        ids = list(prompt_ids)
        first = len(ids) - 1 - ids[::-1].index(self._start) if self._start in ids else 0
        for token_id in ids[first:]:
            self.advance(token_id)

    def advance(self, token_id: int) -> bool:
        """Advance by one token; return whether it belongs to a header, which is not published."""
        if token_id in self.boundaries:
            self._in_header = token_id not in self._ends
            self._name = b"" if token_id == self._channel else None
            self.channel = None
            return self._in_header
        if not self._in_header:
            return False
        if token_id == self._message:
            self._in_header = False
            self.channel = self._parse_name()
        elif self._name is not None:
            self._name += self._token_bytes(token_id)
        return True

    def _parse_name(self) -> str | None:
        words = (self._name or b"").decode(errors="replace").split()
        return words[0] if words and words[0] in _NAMES else None
